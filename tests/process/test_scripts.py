"""Servers that bind the port themselves and say nothing but what they answer."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.supervised import Launched, fake_script, running
from support.waiting import until

from mlx_launcher.supervisor.probe import lacks_model, shortcoming

Launch = Callable[..., Launched]


def test_it_is_ready_when_it_gave_a_token_and_the_port_is_lent_meanwhile(
    launch: Launch, port: int, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    backend = fake_script(port, "--bind-s", "0.3", "--key", "k", "--seen", str(seen), api_key="k")
    launched = launch(backend=backend)
    status = launched.status()
    assert (status["state"], status["phase"], status["listener"]) == ("starting", "importing", "lent")
    status = launched.until_state("ready")
    assert (status["phase"], status["listener"], status["backend"]) == (None, "lent", "mine")
    assert status["server"]["rss_bytes"] > 1 << 20
    asked = json.loads(seen.read_text())
    assert (asked["model"], asked["max_tokens"]) == ("fake", 1)
    assert launched.get() == str(status["server"]["pid"])
    until(lambda: "of the plan" in (launched.instance / "server.log").read_text())
    assert launched.stop() == 0
    assert launched.refuses()
    assert not running(status["server"]["pid"])
    assert "drain" not in launched.events()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--answer", "503", "--answer-s", "1"],
        ["--host", "::1"],
        ["--host", "0.0.0.0"],
        ["--health", '{"model_loaded": false}', "--answer-s", "1"],
    ],
)
def test_it_is_asked_until_it_answers_wherever_it_listens(launch: Launch, port: int, arguments: list[str]) -> None:
    if "::1" in arguments and not socket.has_ipv6:
        pytest.skip("no IPv6")
    launched = launch(backend=fake_script(port, *arguments))
    launched.until_state("ready")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--answer", "500"], "it answers a chat request with HTTP 500"),
        (["--key", "k"], "it answers a chat request with HTTP 401"),
        (["--body", '{"demo": 1}'], "its answer to a chat request has no choices"),
        (["--health", '{"model_loaded": false}'], "its /health says that no model is loaded"),
        (["--body", "<html>"], "its answer to a chat request is not JSON"),
    ],
)
def test_what_answers_otherwise_is_still_starting_and_the_journal_says_why(
    launch: Launch, port: int, arguments: list[str], reason: str
) -> None:
    launched = launch(backend=fake_script(port, *arguments))

    def reasons() -> list[str]:
        return [line["reason"] for line in launched.journal() if line["event"] == "proof_trouble"]

    until(reasons)
    log = launched.instance / "server.log"
    until(lambda: log.read_text().count("POST") > 2)
    assert reasons() == [reason]
    assert (launched.status()["state"], launched.status()["phase"]) == ("starting", "proving")


def test_the_port_is_ours_again_between_two_servers(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port), restart={"backoff_s": 1.0, "backoff_max_s": 1.0})
    for restarts in (1, 2):
        launched.until_state("ready")
        launched.provoke("/die")
        if restarts == 2:  # the second one waits
            until(lambda: launched.status()["listener"] == "owned")
            assert not launched.refuses()
        launched.until_restarts(restarts)
    assert launched.until_state("ready")["listener"] == "lent"


def test_who_took_the_port_in_between_is_named(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port), restart={"backoff_s": 0.3})
    server = launched.until_state("ready")["server"]["pid"]
    os.kill(launched.process.pid, signal.SIGSTOP)  # so that we are there first
    os.kill(server, signal.SIGKILL)
    until(lambda: not running(server))
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        until(lambda: launched.refuses())
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        os.kill(launched.process.pid, signal.SIGCONT)
        assert launched.process.wait(15) == 1
    error = launched.state_file()["status"]["last_error"]
    assert f"port {port} on 127.0.0.1 is taken by" in error
    assert f"(pid {os.getpid()})" in error
    assert "port_trouble" in launched.events()


def test_a_script_that_ends_is_a_crash_loop(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port, "--exit", "7"))
    assert launched.process.wait(10) == 1
    state = launched.state_file()["status"]
    assert (state["state"], "4 crashes" in state["last_error"]) == ("failed", True)
    assert "exited with code 7" in state["last_error"]
    assert launched.refuses()


def test_its_grandchildren_go_with_it(launch: Launch, port: int, tmp_path: Path) -> None:
    file = tmp_path / "grandchild"
    launched = launch(backend=fake_script(port, "--grandchild", str(file)), stop_timeout_s=0.5)
    launched.until_state("ready")
    grandchild = int(file.read_text())
    assert launched.stop() == 0
    assert not running(grandchild)


def test_small_with_a_script_too(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port))
    launched.until_state("ready")
    assert psutil.Process(launched.process.pid).memory_info().rss <= 18 << 20


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "it closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "its answer is not HTTP"),
        (b"HTTP/1.1 429 \xff\r\n\r\n", "it answers a chat request with HTTP 429"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 60_000, "its answer to a chat request is not JSON"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", "its answer to a chat request has no choices"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"choices": []}', "its answer to a chat request has no choices"),
        (b'HTTP/1.1 200\r\nA: b\r\n\r\n{"choices": [{}]}', None),
    ],
)
def test_what_counts_as_a_completion(answer: bytes, reason: str | None) -> None:
    assert shortcoming(answer) == reason


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 404 Not Found\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n{}", b"x\r\n\r\n[]"]
)
def test_a_page_on_health_is_not_demanded(answer: bytes) -> None:
    assert lacks_model(answer) is None
