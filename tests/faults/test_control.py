"""Rows 24 to 26 of the list of faults: what lies around in the directory of an instance, and who asks there."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, suppress
from pathlib import Path

import psutil
import pytest
from support.supervised import Launched
from support.waiting import until

from mlx_launcher.supervisor import clients, control

Launch = Callable[..., Launched]


@pytest.mark.parametrize("left", ["{", "[]", '{"schema": 9}', '{"schema": 1, "server": {"pid": "x"}}', "reused"])
def test_24_a_state_file_that_means_nothing_is_ignored_with_a_note(launch: Launch, instance: Path, left: str) -> None:
    instance.mkdir(parents=True)
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(30)"], start_new_session=True)
    try:
        if left == "reused":  # the same number, another start
            left = json.dumps({"schema": 1, "server": {"pid": stranger.pid, "started": 1.5}})
        (instance / "state.json").write_text(left)
        launched = launch()
        launched.until_state("ready")
        assert stranger.poll() is None
        assert "state_ignored" in launched.events()
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("kind", ["file", "socket", "link"])
def test_25_a_control_socket_that_was_left_is_replaced(launch: Launch, instance: Path, kind: str) -> None:
    instance.mkdir(parents=True)
    name = instance / "control.sock"
    if kind == "file":
        name.write_text("left over")
    elif kind == "link":
        name.symlink_to("/nowhere")
    else:
        with socket.socket(socket.AF_UNIX) as sock, chdir(instance):
            sock.bind("control.sock")
    launched = launch()
    launched.until_state("ready")
    assert name.is_socket()


# -- clients of the control socket


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


def status_at_once(launched: Launched) -> None:
    """The answer does not wait until the other clients' time is over: `call` raises then."""
    answer = control.call(str(launched.instance), {"do": "status"}, timeout_s=clients.CLIENT_S)
    assert answer["data"]["state"] == "ready"


def test_26_silent_clients_hold_nobody_up(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    process = psutil.Process(launched.process.pid)
    fds = process.num_fds()
    for _ in range(50):
        connect()
    status_at_once(launched)
    assert process.num_fds() <= fds + control.MAX_CLIENTS


def test_26_a_silent_client_is_dropped_after_its_time(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    sock = connect()
    sock.settimeout(clients.CLIENT_S * 4)
    sock.sendall(b'{"do":')
    began = time.monotonic()
    assert sock.recv(10) == b""
    assert time.monotonic() - began > clients.CLIENT_S * 0.9


def test_26_a_client_that_never_reads_holds_nobody_up(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    for _ in range(40):
        connect().sendall(b'{"do":"status"}\n')
    status_at_once(launched)


def test_26_a_client_that_leaves_at_once_is_forgotten(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    process = psutil.Process(launched.process.pid)
    fds = process.num_fds()
    for _ in range(40):
        sock = connect()
        sock.sendall(b'{"do":"status"}\n{"do":"status"}\n')
        sock.close()
    status_at_once(launched)
    until(lambda: process.num_fds() <= fds)


@pytest.mark.parametrize(
    "request_", [b"\n", b"garbage\n", b"[]\n", b"\xff\xfe\x00\n", b'{"do":"dance"}\n', b"{}\n", b"[" * 60_000 + b"\n"]
)
def test_26_garbage_is_refused_politely(
    launched: Launched, connect: Callable[[], socket.socket], request_: bytes
) -> None:
    sock = connect()
    sock.sendall(request_)
    assert b'"bad_request"' in sock.recv(65536)
    assert sock.recv(1) == b""
    status_at_once(launched)


def test_26_a_request_of_a_megabyte_is_refused(launched: Launched, connect: Callable[[], socket.socket]) -> None:
    sock = connect()

    def send() -> None:
        with suppress(OSError):  # it need not be taken to its end
            sock.sendall(b"x" * 1_000_000)

    sender = threading.Thread(target=send)
    sender.start()
    assert b'"bad_request"' in sock.recv(65536)
    sender.join()
    status_at_once(launched)
