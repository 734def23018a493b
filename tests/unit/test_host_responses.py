import json

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.events import Call, Ended, Event, Started, Text
from mlx_launcher.host.responses import Answer, error_body, sse

EVENTS: list[Event] = [
    Started(0, 10, 7),
    Text(0, "Well", None),
    Text(0, "…", None),
    Call(0, "call_1", "read", '{"path": "a"}'),
    Ended(0, "tool_calls", 5),
]
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 7},
}
TOLD_CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}


def test_a_whole_chat_answer() -> None:
    answer = Answer("m", chat=True)
    for event in EVENTS:
        answer.add(event)
    whole = answer.whole()
    assert whole["object"] == "chat.completion"
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Well…", "tool_calls": [TOLD_CALL]},
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ]
    assert whole["usage"] == USAGE


def test_the_stream_tells_the_same_story() -> None:
    answer = Answer("m", chat=True)
    chunks = [chunk for event in EVENTS for chunk in answer.chunks(event)]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert "".join(delta.get("content", "") for delta in deltas) == "Well…"
    assert deltas[3] == {"tool_calls": [{"index": 0, **TOLD_CALL}]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "tool_calls"]
    assert answer.usage_chunk()["usage"] == USAGE
    assert answer.usage_chunk()["choices"] == []


def test_an_answer_without_text_has_content_for_clients_that_expect_a_string() -> None:
    answer = Answer("m", chat=True)
    answer.add(Started(0, 1, 0))
    answer.add(Ended(0, "length", 1))
    assert answer.whole()["choices"][0]["message"] == {"role": "assistant", "content": ""}


def test_a_prompt_counts_once_however_many_answers_it_gets() -> None:
    answer = Answer("m", chat=False, answers_per_prompt=2)
    for index in range(4):
        answer.add(Started(index, 10, 4))
        answer.add(Ended(index, "stop", 3))
    assert answer.whole()["usage"]["prompt_tokens"] == 20
    assert answer.whole()["usage"]["completion_tokens"] == 12


def test_an_event_ends_with_a_blank_line() -> None:
    assert sse("[DONE]") == b"data: [DONE]\n\n"
    framed = sse({"a": "line\nbreak"})
    assert framed.count(b"\n") == 2
    assert json.loads(framed.removeprefix(b"data: ")) == {"a": "line\nbreak"}


def test_errors_have_openais_form() -> None:
    told = error_body(RequestError(404, "no such model", param="model", code="model_not_found"))
    assert told == {
        "error": {"message": "no such model", "type": "not_found_error", "param": "model", "code": "model_not_found"}
    }
    assert error_body(RequestError(503, "stopping"))["error"]["type"] == "server_error"
