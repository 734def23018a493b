"""Processes and ports as the system tells them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from mlx_launcher import system

SLEEP = [sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(30)"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_memory_of_a_process(child: subprocess.Popen[bytes]) -> None:
    assert system.rss_bytes(child.pid) == pytest.approx(psutil.Process(child.pid).memory_info().rss, rel=0.1)
    assert (system.rss_bytes(os.getpid()) or 0) > 1 << 20


def test_a_process_is_known_by_its_start(child: subprocess.Popen[bytes]) -> None:
    started = system.process_started(child.pid)
    assert started is not None
    assert system.process_alive(child.pid, started)
    assert not system.process_alive(child.pid, started - 1)
    assert not system.process_alive(child.pid, None)


def test_on_macos_the_start_is_the_same_after_the_clock_was_set(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    started, real = system.process_started(child.pid), psutil.Process.create_time
    # As psutil corrects it, in a process that has imported it before.
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + 3600)
    assert started is not None
    assert system.process_alive(child.pid, started)


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    started = system.process_started(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not system.process_alive(child.pid, started)
    assert not system.group_left(child.pid)
    child.wait()
    assert not system.process_alive(child.pid, started)
    assert system.rss_bytes(child.pid) is None


def test_a_group_without_its_leader() -> None:
    spawn = f"import subprocess, sys; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); sys.stdin.read()"
    leader = subprocess.Popen(
        [sys.executable, "-S", "-c", spawn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        leader.kill()
        leader.wait()
        assert system.group_left(leader.pid)
        os.killpg(leader.pid, signal.SIGKILL)


def test_who_holds_a_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        (holder,) = system.port_holders(sock.getsockname()[1])
    assert holder["pid"] == os.getpid()
    assert holder["name"]
    assert "pytest" in holder["cmdline"]


def test_where_the_system_refuses_every_process_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: AccessDenied for the list of all sockets, and for the sockets of other users' processes."""

    class Process:
        def __init__(self, pid: int, answer: list[object] | psutil.Error) -> None:
            self.pid, self._answer = pid, answer

        def net_connections(self, kind: str) -> list[object]:
            if isinstance(self._answer, psutil.Error):
                raise self._answer
            return self._answer

    def refuse(kind: str) -> None:
        raise psutil.AccessDenied

    ours = SimpleNamespace(status="LISTEN", laddr=SimpleNamespace(port=5))
    others = SimpleNamespace(status="ESTABLISHED", laddr=SimpleNamespace(port=5))
    processes = [Process(1, psutil.AccessDenied()), Process(2, [others]), Process(os.getpid(), [others, ours])]
    monkeypatch.setattr(psutil, "net_connections", refuse)
    monkeypatch.setattr(psutil, "process_iter", lambda: processes)
    assert [holder["pid"] for holder in system.port_holders(5)] == [os.getpid()]


def test_a_holder_that_the_system_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    anonymous = SimpleNamespace(status="LISTEN", laddr=SimpleNamespace(port=5), pid=None)
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [anonymous, anonymous])
    assert system.port_holders(5) == [{"pid": None, "name": "a program of another user", "cmdline": ""}]


def test_the_processor_time_of_a_group_counts_all_of_it_and_only_grows() -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    code = f"import subprocess, sys\n{burn}subprocess.run([sys.executable, '-c', {burn!r}])\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = system.group_cpu_s(process.pid)
        assert used is not None
        assert 0.5 <= used < 10
        process.kill()
    assert system.group_cpu_s(process.pid) is None


@pytest.mark.parametrize(("platform", "expected"), [("linux", [0, 1, 2, 4, 5]), ("darwin", [0] * 5)])
def test_with_what_a_service_ends(platform: str, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert [system.service_exit_code(code) for code in (0, 1, 2, 4, 5)] == expected
