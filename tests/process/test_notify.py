"""What a service tells systemd, received on a real socket as systemd would."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.supervised import Launched
from support.waiting import until

from mlx_launcher.supervisor import notify
from mlx_launcher.supervisor.notify import Notify

Launch = Callable[..., Launched]


class Manager:
    """Receives what is sent to `address`; each message as its lines."""

    def __init__(self, address: str) -> None:
        self.variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        self.heard: list[list[str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._sock.setblocking(False)

    def lines(self) -> list[str]:
        """All that was said so far, line by line."""
        while True:
            try:
                self.heard.append(self._sock.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return [line for message in self.heard for line in message]

    def until(self, line: str, count: int = 1) -> None:
        until(lambda: self.lines().count(line) >= count, 10.0, f"{line!r}, of {self.heard}")

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract sockets")
    manager = Manager(f"@{tmp_path}" if request.param == "abstract" else f"{tmp_path}/notify")
    yield manager
    manager.close()


def test_from_the_port_to_the_end(launch: Launch, manager: Manager) -> None:
    launched = launch("--loading-s", "0.5", managed=manager.variables)
    manager.until("READY=1")
    # Ready is the port, not the model: it is bound, and the server has proved nothing yet.
    assert not launched.refuses()
    assert "STATUS=ready" not in " ".join(manager.lines())
    manager.until(f"STATUS=ready {launched.plan['url']}")
    said = [line.removeprefix("STATUS=").partition(" ")[0] for line in manager.lines() if line.startswith("STATUS=")]
    order = ["starting", "importing", "loading", "proving", "ready"]
    assert [order.index(word) for word in said] == sorted(order.index(word) for word in said)
    assert launched.status()["service"] is True
    manager.until("WATCHDOG=1", manager.lines().count("WATCHDOG=1") + 3)
    launched.process.send_signal(signal.SIGTERM)
    manager.until("STOPPING=1")
    manager.until("STATUS=stopped")
    assert launched.process.wait(15) == 0
    lines = manager.lines()
    assert (lines.count("READY=1"), lines.count("STOPPING=1")) == (1, 1)


def test_nobody_else_speaks_to_the_manager(launch: Launch, manager: Manager) -> None:
    launched = launch(managed=manager.variables, standby=True)
    launched.until_state("ready")
    (standby,) = until(launched.standby_pids)
    for pid in (launched.server_pids()[0], standby):
        assert not set(psutil.Process(pid).environ()) & set(notify.VARIABLES)


def test_a_supervisor_that_no_manager_started_says_nothing(launch: Launch, manager: Manager) -> None:
    """The shell that it was started from may itself be part of a service."""
    for name, value in manager.variables.items():
        os.environ[name] = value
    try:
        launched = launch()
    finally:
        for name in manager.variables:
            del os.environ[name]
    status = launched.until_state("ready")
    assert status["service"] is False
    assert not set(psutil.Process(launched.server_pids()[0]).environ()) & set(notify.VARIABLES)
    assert launched.stop() == 0
    assert manager.lines() == []


def test_alive_is_only_who_turns(launch: Launch, manager: Manager) -> None:
    launched = launch(managed=manager.variables)
    manager.until("WATCHDOG=1", 2)
    launched.process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(launched.process.pid).status() == psutil.STATUS_STOPPED)
    before = manager.lines().count("WATCHDOG=1")
    time.sleep(1.0)  # five half intervals
    assert manager.lines().count("WATCHDOG=1") == before
    launched.process.send_signal(signal.SIGCONT)
    manager.until("WATCHDOG=1", before + 1)


def test_a_stop_that_takes_long_asks_for_more_time(launch: Launch, manager: Manager) -> None:
    launched = launch("--ignore-channel", managed=manager.variables, stop_timeout_s=1.0)
    launched.until_state("ready")
    launched.process.send_signal(signal.SIGTERM)
    manager.until(f"EXTEND_TIMEOUT_USEC={int(notify.EXTEND_S * 1e6)}")
    assert launched.process.wait(15) == 0


def test_a_reload_is_told(launch: Launch, manager: Manager) -> None:
    launched = launch(managed=manager.variables)
    launched.until_state("ready")
    launched.plan_next()
    launched.process.send_signal(signal.SIGHUP)
    manager.until("RELOADING=1")
    (message,) = [message for message in manager.heard if "RELOADING=1" in message]
    assert int(message[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    manager.until("READY=1", 2)
    # One that is refused goes on too.
    launched.refuse_next("no", "Yes", 4)
    launched.process.send_signal(signal.SIGHUP)
    manager.until("READY=1", 3)


def test_a_manager_that_is_gone_or_does_not_read_halts_nobody(tmp_path: Path) -> None:
    for address in (str(tmp_path / "nobody"), "@nobody-here", "relative", "", "vsock:2:1234"):
        silent = Notify({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"})
        silent.ready()
        silent.turned()
    deaf = Manager(f"{tmp_path}/deaf")
    patient = Notify(deaf.variables)
    for number in range(5000):
        patient.status(str(number))
    assert "STATUS=0" in deaf.lines()
    deaf.close()


@pytest.mark.parametrize("usec", ["", "0", "-5", "soon", "400000"])
def test_whose_watchdog_it_is(usec: str, tmp_path: Path) -> None:
    address = f"{tmp_path}/notify"
    manager = Manager(address)
    for pid, mine in ((str(os.getpid()), True), ("1", False), ("", True)):
        manager.heard.clear()
        Notify({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}).turned()
        assert manager.lines() == (["WATCHDOG=1"] if mine and usec == "400000" else [])
    manager.close()


def test_a_stop_is_told_once_and_time_is_asked_for_at_once(tmp_path: Path) -> None:
    manager = Manager(f"{tmp_path}/notify")
    told = Notify(manager.variables)
    told.turned()
    told.stopping()
    told.stopping()
    told.turned()
    told.turned()
    assert manager.lines() == ["WATCHDOG=1", "STOPPING=1", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=20000000"]
    manager.close()


def test_small(launch: Launch, manager: Manager) -> None:
    launched = launch(managed=manager.variables)
    rss: Any = launched.until_state("ready")["supervisor"]["rss_bytes"]
    assert rss < 18 << 20
