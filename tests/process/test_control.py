"""The control socket: bad clients, many clients, long paths, nobody there."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, suppress
from pathlib import Path

import psutil
import pytest
from support.supervised import Launched
from support.waiting import until

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


@pytest.fixture
def launched(launch: Launch) -> Launched:
    started = launch()
    started.until_state("ready")
    return started


@pytest.fixture
def connect(launched: Launched) -> Iterator[Callable[[], socket.socket]]:
    with ExitStack() as stack:

        def new() -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.settimeout(5)
            with chdir(launched.instance):
                until(lambda: sock.connect_ex("control.sock") == 0)
            return sock

        yield new


def quick_status(launched: Launched) -> None:
    began = time.monotonic()
    assert launched.status()["state"] == "ready"
    assert time.monotonic() - began < 0.5


def test_silent_clients_hold_nobody_up(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    process = psutil.Process(launched.process.pid)
    fds = process.num_fds()
    for _ in range(50):
        connect()
    quick_status(launched)
    assert process.num_fds() <= fds + control.MAX_CLIENTS


def test_a_client_that_never_reads_holds_nobody_up(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    for _ in range(40):
        connect().sendall(b'{"do":"status"}\n')
    quick_status(launched)


def test_a_client_that_leaves_at_once_is_forgotten(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    process = psutil.Process(launched.process.pid)
    fds = process.num_fds()
    for _ in range(40):
        sock = connect()
        sock.sendall(b'{"do":"status"}\n{"do":"status"}\n')
        sock.close()
    quick_status(launched)
    until(lambda: process.num_fds() <= fds)


def test_a_silent_client_is_dropped_after_its_time(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    sock = connect()
    sock.settimeout(control.CLIENT_S + 2)
    sock.sendall(b'{"do":')
    began = time.monotonic()
    assert sock.recv(10) == b""
    assert time.monotonic() - began == pytest.approx(control.CLIENT_S, abs=1.5)


@pytest.mark.parametrize(
    "request_", [b"\n", b"garbage\n", b"[]\n", b"\xff\xfe\x00\n", b'{"do":"dance"}\n', b"{}\n", b"[" * 60_000 + b"\n"]
)
def test_garbage_is_refused_politely(launched: Launched, connect: Callable[[], socket.socket], request_: bytes) -> None:
    sock = connect()
    sock.sendall(request_)
    assert b'"bad_request"' in sock.recv(65536)
    assert sock.recv(1) == b""
    quick_status(launched)


@pytest.mark.parametrize("timeout_s", ["5", -1, True, None, [], float("nan"), float("inf")])
def test_stop_with_a_strange_timeout_is_refused(launched: Launched, timeout_s: object) -> None:
    answer = control.call(str(launched.instance), {"do": "stop", "timeout_s": timeout_s})
    assert answer["error"]["code"] == "bad_request"
    quick_status(launched)


def test_a_request_of_a_megabyte_is_refused(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    sock = connect()

    def send() -> None:
        with suppress(OSError):  # it need not be taken to its end
            sock.sendall(b"x" * 1_000_000)

    sender = threading.Thread(target=send)
    sender.start()
    assert b'"bad_request"' in sock.recv(65536)
    sender.join()
    quick_status(launched)


def test_many_honest_clients_at_once(launched: Launched) -> None:
    states: list[str] = []
    threads = [threading.Thread(target=lambda: states.append(launched.status()["state"])) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == ["ready"] * 30


def test_nobody_there(tmp_path: Path) -> None:
    for instance in (tmp_path / "missing", tmp_path):
        with pytest.raises(control.NotRunning) as caught:
            control.call(str(instance), {"do": "status"})
        assert (caught.value.code, caught.value.exit_code) == ("not_running", 3)


def test_a_socket_file_left_over_is_nobody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, chdir(tmp_path):
        sock.bind("control.sock")
    with pytest.raises(control.NotRunning):
        control.call(str(tmp_path), {"do": "status"})


def test_a_supervisor_that_does_not_answer_is_not_called_absent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        with chdir(tmp_path):
            sock.bind("control.sock")
        sock.listen()
        with pytest.raises(LaunchError) as caught:
            control.call(str(tmp_path), {"do": "status"}, timeout_s=0.2)
    assert caught.value.code == "no_answer"


def test_a_state_directory_of_200_characters(launch: Launch, tmp_path: Path) -> None:
    instance = tmp_path / ("d" * 100) / ("e" * 100) / "8081"
    launched = launch(instance=instance)
    here = Path.cwd()
    assert launched.until_state("ready")["server"]
    assert launched.stop() == 0
    with pytest.raises(control.NotRunning):
        launched.status()
    assert Path.cwd() == here
