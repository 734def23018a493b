"""The metrics as a scraper gets them: true to the format, kept over servers that end, and at nobody's expense."""

import contextlib
import http.client
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.supervised import Launched
from support.waiting import free_port, until

from mlx_launcher.supervisor import control
from mlx_launcher.supervisor.metrics import CONTENT_TYPE
from mlx_launcher.supervisor.scrapes import MAX_CLIENTS, MAX_REQUEST

Launch = Callable[..., Launched]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics_port() -> int:
    return free_port()


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): float(sample.value)
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def asked(launched: Launched) -> Samples:
    """What `mlx-launch metrics` prints."""
    data = control.call(str(launched.instance), {"do": "metrics"})["data"]
    assert data["content_type"] == CONTENT_TYPE
    return samples(data["text"])


def scrape(
    port: int, path: str = "/metrics", method: str = "GET", address: str = "127.0.0.1", **headers: str
) -> tuple[int, str | None, str]:
    connection = http.client.HTTPConnection(address, port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read().decode()
    finally:
        connection.close()


def open_scrapes(pid: int, port: int) -> int:
    found = psutil.Process(pid).net_connections("tcp")
    return sum(one.laddr.port == port and one.status != psutil.CONN_LISTEN for one in found)


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"mlx_launch_{name}", frozenset(labels.items())]


def test_the_page_is_openmetrics_on_both_loopback_addresses(launch: Launch, metrics_port: int) -> None:
    launched = launch(metrics_port=metrics_port)
    launched.until_state("ready")
    for address in ("127.0.0.1", "::1"):
        status, kind, text = scrape(metrics_port, address=address)
        assert (status, kind) == (200, CONTENT_TYPE)
        assert text.endswith("# EOF\n")
        found = samples(text)
        assert value(found, "state", mlx_launch_state="ready") == value(found, "up") == 1
        assert value(found, "kv_cache_bytes") == 2
        assert value(found, "memory_bytes", process="server") == 4096
    assert launched.status()["metrics"] == {"url": f"http://127.0.0.1:{metrics_port}/metrics", "problem": None}


def test_nothing_that_was_counted_is_lost_with_a_killed_server(launch: Launch) -> None:
    launched = launch("--counts")
    launched.until_state("ready")
    before: Samples = {}
    for restarts in range(3):
        for _ in range(3):
            launched.get("/answer")
        until(lambda: value(asked(launched), "requests_total", outcome="ok") == 3 * (restarts + 1))  # noqa: B023
        now = asked(launched)
        counters = {
            key: count for key, count in now.items() if key[0].endswith(("_total", "_count", "_bucket", "_sum"))
        }
        assert all(counters[key] >= count for key, count in before.items())
        before = counters
        os.kill(launched.server_pids()[-1], signal.SIGKILL)
        launched.until_restarts(restarts + 1)
        launched.until_state("ready")
    found = asked(launched)
    assert value(found, "requests_total", outcome="ok") == 9
    assert value(found, "completion_tokens_total") == 9 * 4
    assert value(found, "time_to_first_token_seconds_count", cache="cold") == 9
    assert value(found, "token_seconds_count") == 9 * 3
    assert value(found, "server_restarts_total", reason="crash") == 3


def test_requests_that_a_servers_end_cuts_are_counted(launch: Launch) -> None:
    launched = launch("--counts")
    launched.until_state("ready")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", launched.port)))
            client.sendall(b"GET /hang HTTP/1.1\r\n\r\n")
        until(lambda: launched.status()["activity"]["in_flight"] == 2)
        os.kill(launched.server_pids()[-1], signal.SIGKILL)
        until(lambda: value(asked(launched), "requests_total", outcome="cut") == 2)
        launched.until_restarts(1)
    launched.until_state("ready")
    launched.get("/answer")
    until(lambda: launched.status()["activity"]["in_flight"] == 0)
    launched.plan_next()
    launched.restart()  # in good order: nothing is cut
    assert value(asked(launched), "requests_total", outcome="cut") == 2


def test_what_is_not_known_is_no_zero_and_what_lies_on_the_disk_stays(launch: Launch) -> None:
    launched = launch("--loading-s", "3")
    status = launched.until_state("starting")
    assert status["kv_cache"]["dir"] is None
    assert ("mlx_launch_kv_cache_bytes", frozenset()) not in asked(launched)
    launched.until_state("ready")
    until(lambda: value(asked(launched), "kv_cache_memory_bytes") == 4)
    os.kill(launched.server_pids()[-1], signal.SIGKILL)
    status = until(lambda: (seen := launched.status())["phase"] == "loading" and seen)
    assert (status["kv_cache"]["entries"], status["kv_cache"]["bytes"]) == (1, 2)
    # It has told nothing yet.
    assert ("mlx_launch_kv_cache_memory_bytes", frozenset()) not in asked(launched)


@pytest.mark.parametrize(
    ("path", "plan", "reason"),
    [
        ("/kill", {}, "crash"),
        ("/freeze", {"freeze_timeout_s": 0.5}, "freeze"),
        ("/hang", {"hang_timeout_s": 0.5}, "hang"),
        ("/rss?2000000", {"memory_limit_bytes": 1_000_000}, "memory"),
    ],
)
def test_why_a_server_was_replaced(launch: Launch, path: str, plan: dict[str, Any], reason: str) -> None:
    launched = launch(stop_timeout_s=0.5, **plan)
    launched.until_state("ready")
    with socket.create_connection(("127.0.0.1", launched.port)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        launched.until_restarts(1)
    launched.until_state("ready")
    counts = {key: count for key, count in asked(launched).items() if key[0] == "mlx_launch_server_restarts_total"}
    assert {dict(key[1])["reason"] for key, count in counts.items() if count} == {reason}


def test_a_restart_that_was_asked_for_and_a_rollback_are_no_crashes(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next()
    launched.restart()
    launched.plan_next(backend={**launched.plan["backend"], "argv": ["/nowhere"]})
    assert launched.restart()["state"] == "reverted"
    launched.until_state("ready")
    found = asked(launched)
    assert value(found, "server_restarts_total", reason="asked") == 1
    assert value(found, "server_restarts_total", reason="rollback") == 1
    assert value(found, "server_restarts_total", reason="crash") == 0


def test_a_scrape_wakes_no_idle_model(launch: Launch, metrics_port: int) -> None:
    launched = launch(metrics_port=metrics_port, idle_timeout_s=0.5)
    launched.until_state("idle")
    for _ in range(20):
        found = samples(scrape(metrics_port)[2])
        assert value(found, "state", mlx_launch_state="idle") == 1
        assert value(found, "up") == 0
        assert (value(found, "kv_cache_bytes"), value(found, "kv_cache_memory_bytes")) == (2, 0)
        assert asked(launched)
    assert launched.status()["state"] == "idle"
    assert len(launched.server_pids()) == 1
    launched.get()
    assert value(samples(scrape(metrics_port)[2]), "server_restarts_total", reason="demand") == 1


@pytest.mark.parametrize(
    ("path", "method", "host", "status"),
    [
        ("/", "GET", "localhost", 404),
        ("/metrics/", "GET", "localhost", 404),
        ("/metrics?name[]=up", "GET", "[::1]:9", 200),
        ("/metrics", "POST", "localhost", 405),
        ("/metrics", "HEAD", "localhost", 405),
        ("/metrics", "GET", "rebound.example", 403),
        ("/metrics", "GET", "localhost.rebound.example:80", 403),
    ],
)
def test_there_is_one_page_for_those_on_this_machine(
    launch: Launch, metrics_port: int, path: str, method: str, host: str, status: int
) -> None:
    launch(metrics_port=metrics_port)
    assert scrape(metrics_port, path, method, Host=host)[0] == status


def test_26_a_scraper_that_is_slow_silent_or_too_loud_holds_up_nobody(launch: Launch, metrics_port: int) -> None:
    launched = launch(metrics_port=metrics_port)
    launched.until_state("ready")
    slow = [socket.create_connection(("127.0.0.1", metrics_port), timeout=10) for _ in range(MAX_CLIENTS + 4)]
    for sock in slow[::2]:
        sock.sendall(b"GET /metrics HT")
    loud = socket.create_connection(("127.0.0.1", metrics_port), timeout=10)
    loud.sendall(b"x" * (MAX_REQUEST + 1))
    assert loud.recv(100).startswith(b"HTTP/1.1 400")
    assert scrape(metrics_port)[0] == 200
    assert launched.status()["state"] == "ready"
    for sock in slow:  # each is hung up on, the first at once, the last after some seconds
        with sock:
            assert sock.recv(1) == b""
    loud.close()
    until(lambda: open_scrapes(launched.process.pid, metrics_port) == 0)


def test_38_a_taken_metrics_port_is_named(launch: Launch, metrics_port: int) -> None:
    with socket.create_server(("127.0.0.1", metrics_port)):
        report = launch(metrics_port=metrics_port).report
        assert report is not None
        assert (report["exit"], report["error"]["code"]) == (5, "port_in_use")
        assert f"metricsPort: port {metrics_port} on 127.0.0.1 is taken by" in report["error"]["message"]


def test_a_metrics_port_that_is_taken_at_a_restart_costs_the_page_and_nothing_else(
    launch: Launch, metrics_port: int
) -> None:
    launched = launch(metrics_port=metrics_port)
    launched.until_state("ready")
    other = free_port()
    with socket.create_server(("127.0.0.1", other)):
        launched.plan_next(metrics_port=other)
        assert launched.restart()["state"] == "done"
        assert "is taken by" in str(launched.status()["metrics"]["problem"])
        assert "metrics_trouble" in launched.events()
    launched.plan_next(metrics_port=metrics_port)
    launched.restart()
    assert scrape(metrics_port)[0] == 200
    launched.plan_next(metrics_port=None)
    launched.restart()
    with pytest.raises(OSError, match="refused"):
        scrape(metrics_port)
    assert launched.status()["metrics"] is None
