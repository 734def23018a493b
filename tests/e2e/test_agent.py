"""An agent's loop: a system prompt, sixteen tools, streamed, `tool_choice: auto`, many turns."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from support.hosts import Host
from support.launched import chat, http_request
from support.tools import TOOLS
from support.waiting import free_port

from mlx_launcher.demo import AFTER_RESULT, build_demo

SYSTEM = "You are a careful assistant who works in a terminal. " * 20
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("agent")
    with Host(build_demo(directory / "demo"), free_port(), directory / "kvcache") as host:
        yield host


def test_ten_turns_through_the_openai_client_to_the_end(host: Host) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{host.port}/v1", api_key="any", max_retries=0)
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Look around."}]
    before = 0
    for turn in range(10):
        calls: dict[int, dict[str, str]] = {}
        reason, usage, text = None, None, ""
        stream = client.chat.completions.create(
            model="m", messages=messages, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )  # type: ignore[call-overload]
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
                for part in choice.delta.tool_calls or []:
                    call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
                    call["arguments"] += part.function.arguments
        assert usage is not None
        if turn:
            # A warm turn costs what is new: the last answer's end, its result, the new question.
            assert usage.prompt_tokens_details.cached_tokens >= before - 1
        before = usage.prompt_tokens
        if turn % 2 == 0:
            assert (reason, len(calls)) == ("tool_calls", 1)
            call = calls[0]
            jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
            made = {"id": call["id"], "type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
            messages.append({"role": "assistant", "content": text or None, "tool_calls": [made]})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "It is done. " * 50})
        else:
            assert (reason, text) == ("stop", AFTER_RESULT)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"Go on, {turn}."}]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool["function"]["name"])
def test_every_tool_is_called_with_arguments_of_its_schema(host: Host, tool: dict[str, Any]) -> None:
    name = tool["function"]["name"]
    choice = {"type": "function", "function": {"name": name}}
    reply = chat(host.port, "Do it.", tools=TOOLS, tool_choice=choice, max_tokens=800)
    (call,) = reply.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == name
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])


CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "/ü"}'}}


@pytest.mark.parametrize(
    "content", [None, "", "Let me look. ✨", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]]
)
@pytest.mark.parametrize("result", ["", "ok", "日本語 \u0000 \\n", "x" * 50_000, [{"type": "text", "text": "part"}]])
def test_what_an_agent_sends_back_is_answered(host: Host, content: Any, result: Any) -> None:
    messages = [
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]
    assert chat(host.port, messages, tools=TOOLS).text == AFTER_RESULT


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None},
        {"logit_bias": {"10": 5}},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": None, "tools": TOOLS},
        {"tools": [{"type": "function", "function": {"name": "bare"}}]},
        {
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "system", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 3},
    ],
)
def test_what_mlx_textgen_answers_with_500_is_answered(host: Host, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    assert http_request(host.port, "/v1/chat/completions", body).status == 200


def test_a_guided_answer_is_whole_to_its_last_token(host: Host) -> None:
    assert chat(host.port, "Hi", guided_choice=["yes", "no"]).text in {"yes", "no"}
    assert len(chat(host.port, "Hi", guided_regex="[0-9]{4}").text) == 4
