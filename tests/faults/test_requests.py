"""Rows 29–37, 63 and 65 of FAULTS: requests, against the real mlx-textgen."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hosts import Host
from support.launched import Reply, chat, http_request
from support.waiting import free_port, until

from mlx_launcher.demo import GREETING, build_demo, build_random


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("requests")
    settings = {"max_queue": 8, "max_body_bytes": 1 << 20, "require_key": False}
    with Host(build_demo(directory / "demo"), free_port(), directory / "kvcache", settings=settings) as host:
        yield host


def test_36_a_prompt_beyond_the_context_is_refused_with_both_numbers(host: Host) -> None:
    reply = chat(host.port, "x" * 140_000)
    assert reply.status == 400
    assert "131072" in reply.json["error"]["message"]
    assert reply.json["error"]["code"] == "context_length_exceeded"


def test_29_a_client_that_leaves_during_prefill_frees_the_engine_and_its_prompt_is_kept(
    tmp_path: Path,
) -> None:
    model = build_random(tmp_path / "random")
    body = {"messages": [{"role": "user", "content": "word " * 600}], "max_tokens": 2, "temperature": 0}
    with Host(model, free_port(), tmp_path / "kvcache") as host:
        connection = http.client.HTTPConnection("127.0.0.1", host.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        until(lambda: host.counters.get("processed_tokens", 0) > 0)
        connection.close()
        until(lambda: host.counters["in_flight"] == 0)
        processed = host.counters["processed_tokens"]
        assert processed < 3000
        assert host.counters["completion_tokens"] == 0
        retry = http_request(host.port, "/v1/chat/completions", body)
        assert retry.cached >= processed - 512


def test_30_a_client_that_leaves_in_a_stream_ends_it(tmp_path: Path) -> None:
    model = build_random(tmp_path / "random")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "stream": True}
    with Host(model, free_port(), tmp_path / "kvcache") as host:
        connection = http.client.HTTPConnection("127.0.0.1", host.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        assert connection.getresponse().read(200)
        connection.close()
        until(lambda: host.counters["in_flight"] == 0)
        assert host.counters["completion_tokens"] < 4000
        assert chat(host.port, "Hi", max_tokens=2).status == 200


def test_31_a_client_that_does_not_read_does_not_hold_up_the_others(host: Host) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 16}).encode()
    slow = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", host.port))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        slow.append(connection)
    assert [chat(host.port, "Hi").text for _ in range(3)] == [GREETING] * 3
    for connection in slow:
        connection.close()


def test_32_two_hundred_requests_at_once_are_answered_or_told_to_come_back(host: Host) -> None:
    replies: list[Reply] = []

    def ask() -> None:
        replies.append(chat(host.port, "word " * 200))

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 429}
    assert len(statuses) == 200
    assert {reply.headers["retry-after"] for reply in replies if reply.status == 429} == {"1"}
    assert all(reply.text == GREETING for reply in replies if reply.status == 200)
    assert chat(host.port, "Hi").text == GREETING


TORN = {"name": "f", "arguments": "{"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"max_tokens": 0},
        {"tools": [{"type": "function", "function": {}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "type": "function", "function": TORN}],
                }
            ]
        },
        {"guided_regex": "("},
        {"guided_json": {"type": "nothing"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
        {"frequency_penalty": 1.0, "presence_penalty": 1.0},
    ],
)
def test_33_what_is_malformed_is_a_400_in_openais_form(host: Host, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    for streamed in (False, True):
        reply = http_request(host.port, "/v1/chat/completions", {**body, "stream": streamed})
        assert reply.status == 400, reply.body
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}


def test_34_a_body_of_a_hundred_megabytes_is_refused_and_memory_stays_flat(host: Host) -> None:
    process = psutil.Process(host.process.pid)
    before = process.memory_info().rss
    for declared in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=30)
        body = (b"x" * 65536 for _ in range(1600))
        headers = {"Content-Length": str(1600 * 65536)} if declared else {"Transfer-Encoding": "chunked"}
        with contextlib.suppress(ConnectionError):
            connection.request("POST", "/v1/chat/completions", body, headers, encode_chunked=not declared)
        with contextlib.suppress(ConnectionError):
            assert connection.getresponse().status == 413
        connection.close()
    assert process.memory_info().rss - before < 20 << 20
    assert chat(host.port, "Hi").text == GREETING


def test_35_unknown_path_method_and_model_and_a_wrong_key(host: Host, tmp_path: Path) -> None:
    assert http_request(host.port, "/v1/nothing").status == 404
    assert http_request(host.port, "/v1/chat/completions").status == 405
    strict = {"accept_any_model": False, "require_key": True, "api_key": "secret"}
    with Host(build_demo(tmp_path / "demo"), free_port(), tmp_path / "kvcache", settings=strict) as other:
        assert chat(other.port, "Hi").status == 401
        right = {"Authorization": "Bearer secret"}
        body = {"messages": [{"role": "user", "content": "Hi"}], "model": "nobody"}
        unknown = http_request(other.port, "/v1/chat/completions", body, headers=right)
        assert unknown.status == 404
        assert "'nobody'" in unknown.json["error"]["message"]
        assert " m" in unknown.json["error"]["message"]
        assert http_request(other.port, "/v1/chat/completions", {**body, "model": "m"}, headers=right).status == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["system", "user", "assistant", "tool"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": st.text(max_size=30)}), max_size=4)
tools = st.lists(
    st.builds(
        lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
        st.text(max_size=10),
        st.dictionaries(st.sampled_from(["type", "properties", "required", "enum", "$ref"]), values, max_size=3),
    ),
    max_size=3,
)
bodies = st.fixed_dictionaries(
    {"messages": messages | values},
    optional={
        "tools": tools | values,
        "tool_choice": st.sampled_from(["auto", "none", "required"]) | values,
        "stream": st.booleans() | values,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=2) | values,
        "temperature": st.floats(0, 2) | values,
        "top_p": values,
        "n": st.integers(0, 3) | values,
        "logprobs": st.booleans() | values,
        "top_logprobs": st.integers(0, 5) | values,
        "response_format": values,
        "guided_regex": st.text(max_size=8),
        "guided_json": st.dictionaries(st.text(max_size=6), values, max_size=2),
        "logit_bias": st.dictionaries(st.integers(-2, 400).map(str), st.floats(-5, 5), max_size=2) | values,
        "seed": values,
    },
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies)
def test_37_no_request_is_a_5xx_or_the_end_of_the_server(host: Host, body: dict[str, Any]) -> None:
    reply = http_request(host.port, "/v1/chat/completions", {"max_tokens": 4, **body})
    assert reply.status in (200, 400, 404), host.log()[-1000:]
    if reply.status == 200 and body.get("stream") is True:
        assert b'"error"' not in reply.body or b"server_error" not in reply.body
    assert host.process.poll() is None


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("legacy")
    with Host(build_demo(directory / "demo"), free_port(), directory / "none", backend="legacy") as host:
        yield host


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": ""}, 400),
        ({"logit_bias": {"4000000000": 1}}, 400),
        ({"logit_bias": {"9" * 20: 1}}, 400),
        ({"temperature": 1, "top_k": 10**6}, 200),
        ({"temperature": 1, "top_k": 10**30, "seed": 1}, 200),
    ],
)
def test_37_no_request_is_the_end_of_the_legacy_server(legacy: Host, fields: dict[str, Any], status: int) -> None:
    reply = http_request(legacy.port, "/v1/completions", {"prompt": "Hello!", "max_tokens": 2, **fields})
    assert reply.status == status, reply.body
    assert http_request(legacy.port, "/v1/completions", {"prompt": "Hello!", "max_tokens": 2}).status == 200
    assert legacy.process.poll() is None


def test_63_what_clients_asked_who_left_while_no_server_ran_is_never_begun(tmp_path: Path) -> None:
    starting = Host(build_demo(tmp_path / "demo"), free_port(), tmp_path / "kvcache")
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", starting.port)
        connection.request("POST", "/v1/chat/completions", body)
        connection.close()
    with starting as host:
        assert chat(host.port, "Hi").text == GREETING
        until(lambda: host.counters["in_flight"] == 0 and host.counters["requests"] >= 1)
        assert host.counters["requests"] == 1


def test_65_a_supervisor_that_does_not_read_its_channel_holds_up_nobody(tmp_path: Path) -> None:
    deaf = Host(build_demo(tmp_path / "demo"), free_port(), tmp_path / "kvcache", deaf=True)
    until(lambda: _answers(deaf.port))
    assert [chat(deaf.port, "Hi").text for _ in range(50)] == [GREETING] * 50
    deaf.channel.close()
    assert deaf.process.wait(10) == 1


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return http_request(port, "/health", timeout_s=1).status == 200
    return False
