"""What real hosts count: waits for a first token, times of tokens, and how answers ended."""

import http.client
import json
from pathlib import Path
from typing import Any

import pytest
from support.hosts import Host
from support.launched import chat, http_request
from support.waiting import free_port, until

from mlx_launcher.demo import build_demo, build_random

LONG = "Tell me a story. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("model") / "demo")


def counted(host: Host, requests: int) -> dict[str, Any]:
    """The first beat that tells of so many requests."""
    until(lambda: sum(host.counters.get("answers", {}).values()) == requests, 30, f"{requests} requests counted")
    until(lambda: host.counters["in_flight"] == 0, 30, "nothing in flight")
    return host.counters


@pytest.mark.parametrize("backend", ["textgen", "legacy"])
def test_a_host_counts_waits_tokens_and_outcomes(model: Path, tmp_path: Path, backend: str) -> None:
    port = free_port()
    with Host(model, port, tmp_path / "kv", backend=backend) as host:
        talk: list[Any] = [{"role": "user", "content": LONG}]
        first = chat(port, talk, max_tokens=8)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
        second = chat(port, talk, max_tokens=8)
        assert second.cached > first.cached
        assert http_request(port, "/v1/chat/completions", b"{").status == 400
        assert http_request(port, "/v1/models").status == 200
        beat = counted(host, 3)
        written = sum(reply.json["usage"]["completion_tokens"] for reply in (first, second))
        assert {outcome: count for outcome, count in beat["answers"].items() if count} == {"ok": 2, "client_error": 1}
        assert beat["open"] == 0
        assert sum(beat["timings"]["first_token_cold_s"]["counts"]) == 1
        assert sum(beat["timings"]["first_token_warm_s"]["counts"]) == 1
        assert sum(beat["timings"]["token_s"]["counts"]) == written - 2
        assert beat["timings"]["token_s"]["sum"] > 0
        assert beat["tokens_per_s"]["last_answer"] > 0
        assert beat["tokens_per_s"]["last_minute"] > 0


@pytest.mark.parametrize("backend", ["textgen", "legacy"])
def test_a_client_that_leaves_has_cancelled(tmp_path: Path, backend: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "stream": True}
    with Host(build_random(tmp_path / "random"), free_port(), tmp_path / "kv", backend=backend) as host:
        connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        assert connection.getresponse().read(200)
        connection.close()
        assert counted(host, 1)["answers"]["cancelled"] == 1
