"""The HTTP side: an ASGI application over the engine. It never waits for the engine's thread."""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mlx_launcher.host import responses
from mlx_launcher.host.access import check_key, check_model, check_sender, is_loopback
from mlx_launcher.host.engine import Engine, Job, unforeseen
from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.events import Event
from mlx_launcher.host.requests import Generation, parse_chat, parse_completion
from mlx_launcher.host.settings import Settings

log = logging.getLogger("mlx_launcher.host")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# A comment at this interval keeps a proxy or client with an idle timeout from giving up on a long prefill.
KEEP_ALIVE_S = 5.0

# A stream is written at most this often: what else comes of it meanwhile shares one write. No model slower than 100 tokens a
# second is ever held back; at 400, on two cores, it leaves the engine more of them (benchmarks/decode.py).
GATHER_S = 0.01

_JSON = (b"content-type", b"application/json")
_SSE = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class App:
    """Serves `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/v1/models/ID` and `/health`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._created = int(time.time())
        # Asked all day by those who watch the server, and always the same.
        self._constant = {
            "/health": _json(200, {"status": "ok", "model": settings["model_id"], "model_loaded": True}),
            "/v1/models": _json(200, {"object": "list", "data": [self._model()]}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except RequestError as error:
            await _send_error(send, error)
        except Exception as error:
            # Left to uvicorn it would be logged with its message, which may quote a prompt.
            with contextlib.suppress(RuntimeError):  # an answer that has begun can only be cut
                await _send_error(send, unforeseen(error))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"].rstrip("/")
        check_sender(self._settings, scope["headers"])
        if (constant := self._constant.get(path)) is not None:
            _allow(method, "GET")
            self._authorize(scope, exempt_on_loopback=True)
            for message in constant:
                await send(message)
        elif path.startswith("/v1/models/"):
            _allow(method, "GET")
            self._authorize(scope, exempt_on_loopback=True)
            check_model(self._settings, path.removeprefix("/v1/models/"), exact=True)
            await _send_json(send, 200, self._model())
        elif path in ("/v1/chat/completions", "/v1/completions"):
            _allow(method, "POST")
            await self._counted(path == "/v1/chat/completions", scope, receive, send)
        else:
            raise RequestError(
                404, f"there is nothing at {scope['path']}; try /v1/chat/completions, /v1/models or /health"
            )

    async def _counted(self, chat: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """An answer, and how it ended."""
        timings = self._engine.counters.timings
        timings.asked()
        failed: BaseException | None = None
        try:
            self._authorize(scope)
            failed = await self._generate(chat, await self._body(scope, receive), receive, send)
        except BaseException as error:
            failed = error
            raise
        finally:
            timings.ended(failed)

    def _model(self) -> dict[str, Any]:
        return {"id": self._settings["model_id"], "object": "model", "created": self._created, "owned_by": "mlx-launch"}

    def _authorize(self, scope: Scope, *, exempt_on_loopback: bool = False) -> None:
        if not (exempt_on_loopback and _is_loopback(scope)):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            check_key(self._settings, given)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings["max_body_bytes"]
        size = int(next((value for name, value in scope["headers"] if name == b"content-length"), b"0"))
        body = bytearray()
        more = True
        while more and size <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            size = max(size, len(body))
        if size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        return bytes(body)

    async def _generate(self, chat: bool, raw: bytes, receive: Receive, send: Send) -> RequestError | None:
        """What a stream had to be ended with, which has been told to the client then."""
        body, generation = parse_chat(raw) if chat else parse_completion(raw)
        check_model(self._settings, body.model)
        answer = responses.Answer(self._settings["model_id"], chat=chat, answers_per_prompt=generation.n)
        left = asyncio.create_task(_until_left(receive))
        await _let_the_loop_hear(left)
        work = _Work(self._engine, generation, left)
        try:
            if body.stream:
                include_usage = bool(body.stream_options and body.stream_options.include_usage)
                return await self._stream(work, answer, include_usage, send)
            async for batch in work.batches(None):
                for event in batch:
                    answer.add(event)
            self._check_whole(work)
            await _send_json(send, 200, answer.whole())
            return None
        finally:
            work.cancel()
            left.cancel()
            usage = answer.usage
            log.info(
                "%s: %d prompt tokens, %d of them cached, %d generated, %.2f s%s",
                "chat" if chat else "completion",
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                work.seconds,
                ", client left" if work.client_left else "",
            )

    def _check_whole(self, work: "_Work") -> None:
        if work.client_left:
            raise ClientLeftError
        if work.job.cancelled.is_set():
            raise RequestError(503, "the server is stopping", code="stopping", retry_after=1)

    async def _stream(
        self, work: "_Work", answer: responses.Answer, include_usage: bool, send: Send
    ) -> RequestError | None:
        """Headers go out with the first event, so that a request refused before it has its true status."""
        started, failed = False, None
        try:
            async for batch in work.batches(KEEP_ALIVE_S):
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": list(_SSE)})
                    started = True
                chunk = b"".join(map(answer.streamed, batch)) if batch else b": still working\n\n"
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._check_whole(work)
        except RequestError as error:
            if not started or isinstance(error, ClientLeftError):
                raise
            failed = error
            last = responses.sse(responses.error_body(error))
        else:
            last = responses.sse(answer.usage_chunk()) if include_usage else b""
            last += responses.sse("[DONE]")
        await send({"type": "http.response.body", "body": last})
        return failed


class ClientLeftError(RequestError):
    """Nobody is there to answer; the status is what web servers log for it."""

    def __init__(self) -> None:
        super().__init__(499, "the client left")


class _Work:
    """One job in the engine, and its events as they come."""

    def __init__(self, engine: Engine, generation: Generation, left: "asyncio.Task[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._came: deque[Event | RequestError | None] = deque()
        self._woken = False  # whether the loop was told, and has not looked yet
        self._look = asyncio.Event()
        self._began = time.monotonic()
        self._looked = 0.0
        self.client_left = False
        self.job = Job(generation, self._emit)
        left.add_done_callback(self._client_left)
        engine.submit(self.job)

    def _emit(self, event: Event | RequestError | None) -> None:
        """On the engine's thread. The loop is woken once for all that comes until it looks: a wake-up for each token would
        cost the engine the interpreter's lock each time.
        """
        self._came.append(event)
        if event is None:
            self._wake(self._look.set)
        elif not self._woken:
            self._woken = True
            self._wake(self._look_soon)

    def _wake(self, by: Callable[[], object]) -> None:
        # A loop that is closed has nobody left to tell, and the engine must not die of that.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(by)

    def _look_soon(self) -> None:
        """Lets more come where the last look was a moment ago."""
        early = self._looked + GATHER_S - self._loop.time()
        if early > 0:
            self._loop.call_later(early, self._look.set)
        else:
            self._look.set()

    def _client_left(self, left: "asyncio.Task[None]") -> None:
        if not left.cancelled():
            self.client_left = True
            self.cancel()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def cancel(self) -> None:
        self.job.cancelled.set()

    async def batches(self, pause: float | None) -> AsyncIterator[list[Event]]:
        """What has come, at least one event; [] whenever `pause` seconds brought none. Raises the RequestError that the engine
        met.
        """
        batch: list[Event] = []
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._look.wait()
            except TimeoutError:
                yield []
                continue
            self._looked = self._loop.time()
            self._look.clear()
            # In this order: what comes from here on wakes the loop again.
            self._woken = False
            while self._came:
                event = self._came.popleft()
                if event is not None and not isinstance(event, RequestError):
                    batch.append(event)
                    continue
                if batch:
                    yield batch
                if event is not None:
                    raise event
                return
            if batch:
                yield batch
                batch = []


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _let_the_loop_hear(left: "asyncio.Task[None]") -> None:
    """Raises ClientLeftError for a client that was gone before its request was read, as after a wait in the listen queue.

    uvicorn hands such a request over all the same (5 of 5 tried): the end of the connection is read a few turns later.
    """
    for _ in range(5):
        await asyncio.sleep(0)
    if left.done():
        raise ClientLeftError


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise RequestError(405, f"{method} is not possible here; use {' or '.join(allowed)}")


def _is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is None or is_loopback(client[0])


def _json(status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A whole answer, as ASGI has it."""
    raw = json.dumps(body).encode()
    length = (b"content-length", str(len(raw)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]}
    return start, {"type": "http.response.body", "body": raw}


async def _send_json(send: Send, status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]) -> None:
    for message in _json(status, body, *headers):
        await send(message)


async def _send_error(send: Send, error: RequestError) -> None:
    headers = []
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 413:
        # What the client still sends of its body is not read.
        headers.append((b"connection", b"close"))
    await _send_json(send, error.status, responses.error_body(error), *headers)
