"""Several ranks on this machine: all of it but ssh and the network."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from support.clusters import Cluster, answers, expected
from support.families import TOKENS
from support.hosts import Host
from support.launched import chat
from support.tools import TOOLS
from support.waiting import free_port, until

Start = Callable[..., Cluster]
ONE = {"peers": [{"host": "127.0.0.1"}]}
THREE = {"peers": [{"host": "127.0.0.1"}] * 3}


@pytest.mark.parametrize(("model", "peers", "strategy"), [("llama", ONE, "tensor"), ("qwen2", THREE, "pipeline")])
def test_served_as_one_machine_would(
    cluster: Start, model: str, peers: dict[str, Any], strategy: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    served = cluster(path, peers)
    status = served.ready()
    count = len(peers["peers"]) + 1
    assert [(row["rank"], row["host"], row["state"]) for row in status["ranks"]] == [
        (number, "127.0.0.1", "ready") for number in range(count)
    ]
    until(lambda: all(map(gets_on, served.status()["ranks"])), 10, "ranks that get on")
    assert strategy in "".join(json.loads(served.command("plan", "--json").stdout)["data"]["notes"])
    assert answers(served) == answers(served) == expected(path)
    assert served.command("restart").returncode == 0
    assert answers(served) == expected(path)
    assert served.command("stop").returncode == 0
    assert served.processes() == []


def gets_on(row: dict[str, Any]) -> bool:
    return row["rss_bytes"] > 1e7 and row["last_progress_s"] is not None and row["last_progress_s"] < 5


def test_an_agents_loop_through_the_openai_client(cluster: Start, llama: Path, tmp_path: Path) -> None:
    """The random model calls no tool, so that the calls are the test's; what it says has to be one machine's to the letter."""
    served = cluster(llama, ONE)
    messages: list[Any] = [{"role": "system", "content": "You are careful. " * 10}]
    said, before = [], 0
    for turn in range(4):
        call = {"id": f"c{turn}", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "/a"}'}}
        messages += [
            {"role": "user", "content": f"Look at it, {turn}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "It is done. " * 20},
        ]
        text, usage = streamed(served.port, messages)
        assert usage.prompt_tokens_details.cached_tokens >= before * 0.9
        before = usage.prompt_tokens
        said.append(text)
        messages.append({"role": "assistant", "content": text})
    with Host(llama, free_port(), tmp_path / "none", backend="legacy") as one:
        ends = [number for number, message in enumerate(messages) if message.get("content") in said]
        assert [streamed(one.port, messages[:end])[0] for end in ends] == said


def streamed(port: int, messages: list[Any]) -> tuple[str, Any]:
    client: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    stream = client.chat.completions.create(
        model="m",
        messages=messages,
        tools=TOOLS,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=TOKENS,
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, usage


def test_a_client_that_leaves_and_a_seed_leave_no_rank_behind(cluster: Start, llama: Path) -> None:
    served = cluster(llama, ONE)
    for fields in ({}, {"seed": 1}):
        with pytest.raises(TimeoutError):
            chat_until(served.port, 0.5, max_tokens=600, **fields)
        assert chat(served.port, "Hi", max_tokens=4).status == 200
    assert served.status()["server"]["restarts"] == 0


def chat_until(port: int, timeout_s: float, **fields: Any) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=timeout_s)
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], **fields)
    except openai.APITimeoutError:
        raise TimeoutError from None


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_freezes(cluster: Start, llama: Path, number: int, how: signal.Signals) -> None:
    served = cluster(llama, ONE)
    before = served.ready()
    began = time.monotonic()
    served.rank(number).send_signal(how)
    said = served.named(f"{how.name} of rank {number} of 2, loopback", f"rank {number}", began)
    assert ("SIGKILL" if how == signal.SIGKILL else "froze") in said
    until(lambda: not any(map(alive, before["ranks"])), 10, "the end of all ranks")
    served.ready(after=before["server"]["pid"])
    reason = "crash" if how == signal.SIGKILL else "freeze"
    assert f'mlx_launch_server_restarts_total{{reason="{reason}"}} 1' in served.command("metrics").stdout.splitlines()
    assert answers(served) == expected(llama)


def alive(row: dict[str, Any]) -> bool:
    try:
        os.kill(row["pid"], 0)
    except ProcessLookupError:
        return False
    return True


def test_one_of_four_dies_in_the_middle_of_an_answer(cluster: Start, qwen2: Path) -> None:
    served = cluster(qwen2, THREE)
    before = served.ready()
    stream = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_retries=0)
    chunks = iter(
        stream.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=4000, stream=True
        )
    )
    next(chunks)
    began = time.monotonic()
    served.rank(2).kill()
    served.named("SIGKILL of rank 2 of 4, in an answer", "rank 2", began)
    ends: list[Any] = []
    with contextlib.suppress(openai.APIError, OSError):
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == []
    served.ready(after=before["server"]["pid"])
    assert answers(served) == expected(qwen2)


def test_a_frozen_start(cluster: Start, llama: Path) -> None:
    served = cluster(llama, ONE)
    before = served.ready()
    served.rank(0).kill()
    until(lambda: len(rows := served.status()["ranks"]) == 2 and rows[1]["pid"] not in pids(before), 20, "a new rank 1")
    served.rank(1).send_signal(signal.SIGSTOP)
    said = served.named("SIGSTOP of rank 1 of 2 while it starts", "rank 1", time.monotonic())
    assert "froze" in said
    served.ready(after=before["server"]["pid"])


def pids(status: dict[str, Any]) -> list[int]:
    return [row["pid"] for row in status["ranks"]]


def test_a_frozen_leader(cluster: Start, llama: Path) -> None:
    """Its ranks are never idle, so they have to end before it can be seen that nothing moves."""
    served = cluster(llama, ONE, freezeTimeout="4s")
    before = served.ready()
    os.kill(before["server"]["pid"], signal.SIGSTOP)
    served.ready(after=before["server"]["pid"])
    assert "froze" in served.status()["server"]["last_exit"]["reason"]
    assert answers(served) == expected(llama)


def test_nothing_outlives_a_killed_supervisor(cluster: Start, llama: Path) -> None:
    served = cluster(llama, ONE)
    os.kill(served.ready()["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: not served.processes(), 10, "an end of all processes")


def test_a_crash_loop_ends_on_one_machine(cluster: Start, llama: Path) -> None:
    served = cluster(llama, ONE, restart={"maxRestarts": 0})
    served.rank(1).kill()
    until(lambda: served.status()["state"] == "degraded", 60, "the fallback")
    status = served.status()
    assert (status["backend"], status["ranks"]) == ("mlx-legacy", [])
    assert "rank 1" in status["rollback"]["reason"]
    assert answers(served) == expected(llama)
