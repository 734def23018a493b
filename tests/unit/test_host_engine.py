"""The engine and the HTTP side over a runtime that is told what to do: what must hold whatever the model does."""

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_launcher.host.app import App
from mlx_launcher.host.engine import Counters, Engine, Job
from mlx_launcher.host.errors import ModelFault, QueueFullError, RequestError
from mlx_launcher.host.events import Ended, Event, Started, Text
from mlx_launcher.host.proof import prove
from mlx_launcher.host.requests import Generation
from mlx_launcher.host.settings import Settings

SETTINGS: Settings = {
    "model_path": "/models/m",
    "model_id": "m",
    "names": ["m", "Org/M"],
    "accept_any_model": False,
    "api_key": "secret",
    "require_key": False,
    "max_queue": 2,
    "max_body_bytes": 2000,
    "prefill_batch": 512,
    "warmup": [],
    "cache": {
        "enabled": False,
        "dir": "/nowhere",
        "slots": 1,
        "min_tokens": 1,
        "memory_bytes": None,
        "max_bytes": None,
    },
}


class Scripted:
    """A runtime whose answers are made by `answer`; `gate` holds it until a test lets it go on."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun: queue.Queue[Generation] = queue.Queue()
        self.failure: Exception | None = None

    def load(self, settings: Settings, progress: Callable[[int, int], object]) -> None:
        progress(1, 1)

    def generate(self, request: Generation, cancelled: threading.Event, counters: Counters) -> Iterator[Event]:
        self.begun.put(request)
        if self.failure and request.max_tokens != 1:
            raise self.failure
        yield Started(0, 5, 2)
        yield Text(0, "Hel", None)
        while not self.gate.wait(0.01):
            if cancelled.is_set():
                return
        if self.failure:
            raise self.failure
        yield Text(0, "lo", None)
        yield Ended(0, "stop", 2)

    def rest(self, wanted: threading.Event) -> float | None:
        return None

    def flush(self) -> None:
        pass

    def notes(self) -> list[str]:
        return []

    def kv_cache(self) -> dict[str, Any] | None:
        return None


deaths: queue.Queue[str] = queue.Queue()


def started(runtime: Any, faults: "queue.Queue[ModelFault | None] | None" = None) -> Engine:
    loaded: queue.Queue[ModelFault | None] = faults if faults is not None else queue.Queue()
    engine = Engine(lambda: runtime, lambda *phase: None, loaded.put, lambda: None, deaths.put)
    engine.start()
    engine.activate(SETTINGS)
    if faults is None:
        assert loaded.get(timeout=10) is None
    return engine


async def ask(
    app: App,
    path: str,
    body: Any = None,
    *,
    headers: Any = (),
    client: str = "127.0.0.1",
    gone: asyncio.Event | None = None,
) -> tuple[int, dict[str, str], bytes]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    parts = [raw[at : at + 1000] for at in range(0, len(raw), 1000)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    method = "GET" if body is None else "POST"
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "client": (client, 1)}
    await app(scope, receive, send)
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:])


CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def ended(app: App) -> dict[str, int]:
    """How the requests for an answer ended so far."""
    return {name: count for name, count in app._engine.counters.timings.told()["answers"].items() if count}


@pytest.fixture
def runtime() -> Scripted:
    return Scripted()


@pytest.fixture
def app(runtime: Scripted) -> App:
    return App(started(runtime), SETTINGS)


def test_an_answer_whole_and_streamed(app: App) -> None:
    status, headers, body = asyncio.run(ask(app, CHAT, HELLO))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["choices"][0]["message"]["content"] == "Hello"
    assert json.loads(body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    status, headers, body = asyncio.run(
        ask(app, CHAT, {**HELLO, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello"
    assert chunks[-1]["usage"]["total_tokens"] == 7


def test_requests_beyond_the_queue_are_told_to_come_back_and_the_others_are_answered(
    app: App, runtime: Scripted
) -> None:
    runtime.gate.clear()

    async def crowd() -> list[tuple[int, dict[str, str], bytes]]:
        asks = [asyncio.create_task(ask(app, CHAT, HELLO)) for _ in range(5)]
        refused = list(await asyncio.gather(*asks[3:]))
        runtime.gate.set()
        return [*await asyncio.gather(*asks[:3]), *refused]

    answers = asyncio.run(crowd())
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    assert answers[-1][1]["retry-after"] == "1"
    assert ended(app) == {"ok": 3, "queue_full": 2}


def test_a_client_that_leaves_ends_its_work_and_one_that_left_while_it_waited_is_never_begun(
    app: App, runtime: Scripted
) -> None:
    runtime.gate.clear()

    async def leave() -> None:
        gone = asyncio.Event()
        first = asyncio.create_task(ask(app, CHAT, {**HELLO, "user": "first"}, gone=gone))
        while runtime.begun.empty():
            await asyncio.sleep(0.001)
        second = asyncio.create_task(ask(app, CHAT, HELLO, gone=gone))
        while app._engine.counters.queued < 1:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.gather(first, second)

    asyncio.run(asyncio.wait_for(leave(), 10))
    assert ended(app) == {"cancelled": 2}
    runtime.gate.set()
    assert asyncio.run(ask(app, CHAT, HELLO))[0] == 200
    assert runtime.begun.qsize() == 2


def test_a_stop_ends_what_is_in_flight_and_says_so(app: App, runtime: Scripted) -> None:
    runtime.gate.clear()

    async def stop(streamed: bool) -> tuple[int, dict[str, str], bytes]:
        task = asyncio.create_task(ask(app, CHAT, {**HELLO, "stream": streamed}))
        while not app._engine.counters.in_flight:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        app._engine.cancel_all()
        return await task

    status, headers, body = asyncio.run(asyncio.wait_for(stop(False), 10))
    assert (status, headers["retry-after"]) == (503, "1")
    status, _, body = asyncio.run(asyncio.wait_for(stop(True), 10))
    last = body.decode().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert ended(app) == {"cancelled": 2}
    assert b"[DONE]" not in body


def test_a_failing_engine_is_a_500_before_the_stream_and_an_event_within_it(app: App, runtime: Scripted) -> None:
    runtime.failure = ZeroDivisionError("a secret prompt")
    status, _, body = asyncio.run(ask(app, CHAT, {**HELLO, "stream": True}))
    assert status == 500
    assert json.loads(body)["error"]["type"] == "server_error"
    assert b"secret" not in body

    status, _, body = asyncio.run(ask(app, CHAT, {**HELLO, "stream": True, "max_tokens": 1}))
    assert status == 200
    assert body.count(b'"engine_error"') == 1
    runtime.failure = None
    assert asyncio.run(ask(app, CHAT, HELLO))[0] == 200
    assert ended(app) == {"ok": 1, "server_error": 2}


def test_a_stream_that_waits_is_kept_alive_by_comments(
    app: App, runtime: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_launcher.host.app.KEEP_ALIVE_S", 0.02)
    runtime.gate.clear()
    threading.Timer(0.3, runtime.gate.set).start()
    _, _, body = asyncio.run(ask(app, CHAT, {**HELLO, "stream": True}))
    comments = [event for event in body.decode().split("\n\n") if event.startswith(": ")]
    assert comments
    assert body.endswith(b"data: [DONE]\n\n")


def test_models_and_health(app: App) -> None:
    assert json.loads(asyncio.run(ask(app, "/health"))[2]) == {"status": "ok", "model": "m", "model_loaded": True}
    assert [model["id"] for model in json.loads(asyncio.run(ask(app, "/v1/models"))[2])["data"]] == ["m"]
    assert asyncio.run(ask(app, "/v1/models/Org/M"))[0] == 200
    status, _, body = asyncio.run(ask(app, CHAT, {**HELLO, "model": "other"}))
    assert status == 404
    assert "m, Org/M" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/nothing", None, 404), (CHAT, None, 405), ("/v1/models", {}, 405), (CHAT, b"{", 400), (CHAT, b" " * 3000, 413)],
)
def test_what_cannot_be_answered_has_its_status(app: App, path: str, body: Any, status: int) -> None:
    told, _, answer = asyncio.run(ask(app, path, body))
    assert told == status
    assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


def test_a_key_is_demanded_where_the_settings_do_and_models_and_health_are_exempt_on_loopback(
    runtime: Scripted,
) -> None:
    app = App(started(runtime), {**SETTINGS, "require_key": True})
    right = [(b"authorization", b"Bearer secret")]
    wrong = [(b"authorization", b"Bearer guess")]
    statuses = [
        asyncio.run(ask(app, path, body, headers=headers, client=client))[0]
        for path, body, headers, client in [
            (CHAT, HELLO, right, "127.0.0.1"),
            (CHAT, HELLO, wrong, "127.0.0.1"),
            (CHAT, HELLO, [], "::1"),
            ("/v1/models", None, [], "::1"),
            ("/health", None, [], "10.0.0.5"),
            ("/health", None, right, "10.0.0.5"),
        ]
    ]
    assert statuses == [200, 401, 401, 200, 401, 200]


def test_the_proof_goes_through_the_app_and_fails_with_its_reason(runtime: Scripted) -> None:
    app = App(started(runtime), {**SETTINGS, "require_key": True})
    asyncio.run(prove(app, SETTINGS))
    assert runtime.begun.get_nowait().max_tokens == 1
    runtime.failure = RequestError(400, "the template refuses")
    with pytest.raises(ModelFault, match="the template refuses"):
        asyncio.run(prove(app, SETTINGS))


@pytest.mark.parametrize(
    ("failure", "words"),
    [(ModelFault("torn", "again"), "torn"), (MemoryError("too big"), "MemoryError while loading: too big")],
)
def test_a_model_that_does_not_load_is_a_fault(failure: Exception, words: str) -> None:
    class Broken(Scripted):
        def load(self, settings: Settings, progress: Callable[[int, int], object]) -> None:
            raise failure

    faults: queue.Queue[ModelFault | None] = queue.Queue()
    started(Broken(), faults)
    fault = faults.get(timeout=10)
    assert fault is not None
    assert fault.reason == words


@pytest.fixture
def busy() -> Iterator[Engine]:
    """One that answers nothing."""
    runtime = Scripted()
    runtime.gate.clear()
    engine = started(runtime)
    yield engine
    engine.cancel_all()


def submitted(engine: Engine, count: int) -> list[Job]:
    jobs = [Job(Generation(prompts=["x"]), lambda event: None) for _ in range(count)]
    for job in jobs:
        engine.submit(job)
    return jobs


def test_a_full_queue_names_how_many_wait(busy: Engine) -> None:
    submitted(busy, 3)
    with pytest.raises(QueueFullError, match="2 requests"):
        submitted(busy, 1)


def test_whose_client_has_left_takes_no_place_in_the_queue(busy: Engine) -> None:
    for job in submitted(busy, 3)[1:]:
        job.cancelled.set()
    submitted(busy, 2)
    with pytest.raises(QueueFullError, match="2 requests"):
        submitted(busy, 1)


def test_what_nobody_foresaw_is_a_500_and_its_message_is_not_logged(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a secret prompt")

    monkeypatch.setattr("mlx_launcher.host.app.check_model", fail)
    status, _, body = asyncio.run(ask(app, CHAT, HELLO))
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text + body.decode()
