"""The requests that anyclaude 8366a02 sends (recorded from its proxy: AI SDK for OpenAI 2.0.53), replayed."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.hosts import Host
from support.launched import stream_events
from support.tools import TOOLS
from support.waiting import free_port

from mlx_launcher.demo import AFTER_RESULT, build_demo

HEADERS = {
    "connection": "keep-alive",
    "authorization": "Bearer mlx",
    "content-type": "application/json",
    "user-agent": "ai-sdk/openai/2.0.53 ai-sdk/provider-utils/3.0.12 runtime/node.js/v20.20.2",
    "accept": "*/*",
    "accept-language": "*",
    "sec-fetch-mode": "cors",
    "accept-encoding": "gzip, deflate",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("anyclaude")
    model = build_demo(directory / "models" / "demo")
    settings = {"names": [str(model)], "accept_any_model": False}
    with Host(model, free_port(), directory / "kvcache", settings=settings) as host:
        host.model_path = str(model)  # type: ignore[attr-defined]
        yield host


def body(host: Host, messages: list[dict[str, Any]]) -> dict[str, Any]:
    tools = [{"type": "function", "function": {**tool["function"], "strict": False}} for tool in TOOLS]
    return {
        # The configuration's `model` verbatim: a path, which mlx-textgen alone answers with 404.
        "model": host.model_path,  # type: ignore[attr-defined]
        "messages": messages,
        "tools": tools,
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 400,
    }


def post(host: Host, messages: list[dict[str, Any]]) -> list[Any]:
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body(host, messages)), HEADERS)
    response = connection.getresponse()
    assert response.status == 200
    *chunks, done = stream_events(response.read())
    assert done == "[DONE]"
    return chunks


def test_a_call_and_its_result(host: Host) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are careful. " * 30},
        {"role": "user", "content": "Look around."},
    ]
    *chunks, usage = post(host, messages)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    # Its converter opens a text block for any content, an empty one too, and then miscounts the blocks.
    assert [list(delta) for delta in deltas] == [["role"], ["tool_calls"], []]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    call = deltas[1]["tool_calls"][0]

    # How it sends them back: content is the empty string beside the calls.
    messages.append(
        {"role": "assistant", "content": "", "tool_calls": [{key: call[key] for key in ("id", "type", "function")}]}
    )
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "done"})
    *chunks, usage = post(host, messages)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == AFTER_RESULT
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000


def test_its_check_of_readiness(host: Host) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=10)
    connection.request("GET", "/v1/models", headers={"accept": "*/*", "sec-fetch-mode": "cors", "user-agent": "node"})
    assert connection.getresponse().status == 200
