from typing import Any

import pytest

from mlx_launcher.host.chat import render
from mlx_launcher.host.errors import RequestError


class Recorder:
    """Stands for a tokenizer: remembers what the template was given."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.given: dict[str, Any] = {}

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.given = {"messages": messages, **options}
        return "prompt"


def messages_given(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    recorder = Recorder()
    assert render(recorder, list(messages), None) == "prompt"
    given: list[dict[str, Any]] = recorder.given["messages"]
    return given


def test_text_parts_become_one_string_and_null_the_empty_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [
        m["content"] for m in messages_given({"role": "user", "content": parts}, {"role": "user", "content": None})
    ] == [
        "a\nb",
        "",
    ]


def test_a_developer_is_a_system_message() -> None:
    assert messages_given({"role": "developer", "content": "x"})[0]["role"] == "system"


def test_arguments_become_objects_and_content_beside_them_is_kept() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    empty = {"id": "d", "type": "function", "function": {"name": "g", "arguments": ""}}
    given = messages_given({"role": "assistant", "content": "Let me look.", "tool_calls": [call, empty]})[0]
    assert given["content"] == "Let me look."
    assert [c["function"]["arguments"] for c in given["tool_calls"]] == [{"a": 1}, {}]


def test_a_last_assistant_message_is_continued_unless_it_called() -> None:
    for message, continued in (
        ({"role": "user", "content": "x"}, False),
        ({"role": "assistant", "content": "x"}, True),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, False),
    ):
        recorder = Recorder()
        render(recorder, [message], None)
        assert recorder.given["continue_final_message"] is continued
        assert recorder.given["add_generation_prompt"] is not continued


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_what_no_template_can_show_is_a_400(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        render(Recorder(), [message], None)
    assert caught.value.status == 400
    assert str(caught.value.param).startswith("messages.0.")


def test_a_template_that_refuses_is_a_400_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render(Recorder("roles must alternate"), [{"role": "user", "content": "x"}], None)
    assert caught.value.status == 400
