"""The legacy server's own parts: Harmony, calls that are none, stop strings. The handler is real, the tokens scripted."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.server import GenerationContext, Response
from support.launched import stream_events

from mlx_launcher.demo import build_demo
from mlx_launcher.host import legacy_harmony
from mlx_launcher.host.legacy_service import Service
from mlx_launcher.host.settings import Settings

HARMONY = (
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Ulm", "days": 2}'
)
TOOL = {"type": "function", "function": {"name": "get_weather"}}


class Scripted:
    """A service whose model says what a test tells it to; the rest is real."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.said = ""
        self.finish: str | None = "stop"
        self.piece = 3
        self._real = service.generator.generate
        service.generator.generate = self._generate  # type: ignore[method-assign, assignment]

    def _generate(self, request: Any, arguments: Any, progress_callback: Any) -> Any:
        context, _ = self._real(request, arguments, progress_callback)
        context.stop()
        scripted = GenerationContext(True, False, self.parse, context.text_sm, "normal", context.prompt, 0)
        return scripted, self._answers()

    def _answers(self) -> Iterator[Any]:
        for start in range(0, len(self.said), self.piece):
            yield Response(self.said[start : start + self.piece], 1, 0.0, None, ())
        yield Response("", 2, 0.0, self.finish, ())

    @staticmethod
    def parse(text: str, _tools: Any) -> Any:
        return json.loads(text)

    def ask(self, **fields: Any) -> tuple[int, bytes]:
        ours, theirs = socket.socketpair()
        self.service._servers[0].process_request(theirs, ("127.0.0.1", 0))
        connection = http.client.HTTPConnection("127.0.0.1")
        connection.sock = ours
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, answer

    def message(self, **fields: Any) -> tuple[dict[str, Any], str]:
        status, raw = self.ask(**fields)
        assert status == 200, raw
        choice = json.loads(raw)["choices"][0]
        return choice["message"], choice["finish_reason"]

    def streamed(self, **fields: Any) -> tuple[str, str, list[Any], str]:
        """Content, reasoning, calls and the finish reason of a stream."""
        *events, done = stream_events(self.ask(stream=True, **fields)[1])
        assert done == "[DONE]"
        deltas = [event["choices"][0]["delta"] for event in events]
        content = "".join(delta.get("content") or "" for delta in deltas)
        reasoning = "".join(delta.get("reasoning") or "" for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        return content, reasoning, calls, events[-1]["choices"][0]["finish_reason"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = build_demo(tmp_path_factory.mktemp("models") / "demo")
    settings: Settings = {
        "model_path": str(model),
        "model_id": "m",
        "names": ["m"],
        "accept_any_model": True,
        "api_key": None,
        "require_key": False,
        "max_queue": 1,
        "max_body_bytes": 100000,
        "prefill_batch": 512,
        "warmup": [],
        "cache": {"enabled": True, "dir": "", "slots": 3, "min_tokens": 1, "memory_bytes": 12345, "max_bytes": None},
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Service(settings, [listener], lambda *_: None)
        yield service
        service.generator.stop_and_join()


@pytest.fixture
def scripted(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(service, "harmony", False)
    scripted = Scripted(service)
    yield scripted
    service.generator.generate = scripted._real  # type: ignore[method-assign]


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_harmony_is_sorted_into_reasoning_and_a_call(scripted: Scripted, piece: int) -> None:
    scripted.service.harmony = True
    scripted.said, scripted.piece = HARMONY, piece
    message, reason = scripted.message()
    assert (message["content"], message["reasoning"], reason) == (None, "Let me see.", "tool_calls")
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Ulm", "days": 2}
    content, reasoning, calls, reason = scripted.streamed()
    assert (content, reasoning, reason, len(calls)) == ("", "Let me see.", "tool_calls", 1)


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ("plain text", "plain text"),
        ("<|channel|>final<|message|>It rains.", "It rains."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It rains.", "It rains."),
        ("<|channel|>commentary<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So.", "So."),
        ("<|channel|>final <|constrain|>json<|message|>{}", "{}"),
    ],
)
def test_harmonys_final_channel_is_the_answer(scripted: Scripted, said: str, content: str) -> None:
    scripted.service.harmony = True
    scripted.said = said
    assert scripted.message()[0]["content"] == content
    assert scripted.streamed()[0] == content


def test_a_harmony_call_whose_recipient_comes_first() -> None:
    call = legacy_harmony.parse_call("x.y<|channel|>commentary json<|message|>{}", None)
    assert call == {"name": "x.y", "arguments": {}}


def test_a_harmony_call_that_is_cut_is_left_out(scripted: Scripted) -> None:
    scripted.service.harmony = True
    scripted.said, scripted.finish = HARMONY[:-3], "length"
    message, reason = scripted.message()
    assert "tool_calls" not in message
    assert reason == "length"


@pytest.mark.parametrize("said", ["{}", "[]", "3", '{"name": 1, "arguments": {}}', '{"name": "x"}', "{", "[{}]"])
def test_a_call_that_is_none_does_not_end_the_answer_in_calls(scripted: Scripted, said: str) -> None:
    scripted.said = f"<tool_call>{said}</tool_call>"
    message, reason = scripted.message()
    assert ("tool_calls" in message, reason) == (False, "stop")
    assert scripted.streamed()[2:] == ([], "stop")


def test_mlx_lms_own_parsers_calls(scripted: Scripted) -> None:
    scripted.said = 'So: <tool_call>{"name": "get_weather", "arguments": {"city": "Ulm"}}</tool_call>'
    message, reason = scripted.message()
    assert (message["content"], reason, len(message["tool_calls"])) == ("So: ", "tool_calls", 1)
    assert scripted.streamed()[2][0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize("piece", [1, 4, 100])
def test_stop_strings_end_the_text_however_it_comes(scripted: Scripted, piece: int) -> None:
    scripted.said, scripted.piece = "one two END three EN", piece
    for stop in ("END", ["nothing", "END"]):
        message, reason = scripted.message(stop=stop)
        assert (message["content"], reason) == ("one two ", "stop")
    # What only looked like one is shown, however the answer ends.
    for finish in ("stop", "length"):
        scripted.finish = finish
        message, reason = scripted.message(stop="EN!")
        assert (message["content"], reason) == ("one two END three EN", finish)
        assert scripted.streamed(stop="EN!")[0] == "one two END three EN"


def test_what_breaks_in_the_middle_is_said(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterator[Any]:
        yield Response("some text", 1, 0.0, None, ())
        raise ValueError("secret words")

    scripted._answers = broken  # type: ignore[method-assign]
    status, raw = scripted.ask()
    assert (status, json.loads(raw)["error"]["code"]) == (500, "engine_error")
    *_, last = stream_events(scripted.ask(stream=True)[1])
    assert last["error"]["type"] == "server_error"
    assert "secret words" not in caplog.text


def test_more_than_may_wait_are_refused(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted.service, "_live", scripted.service._width + 1)
    status, raw = scripted.ask()
    assert (status, json.loads(raw)["error"]["code"]) == (429, "queue_full")


def test_the_prompt_cache_is_bounded(service: Service, tmp_path: Path) -> None:
    cache = service.generator.prompt_cache
    assert (cache.max_size, cache.max_bytes) == (3, 12345)
    assert service.provider.cli_args.prompt_cache_bytes == 12345
