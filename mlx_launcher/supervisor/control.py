"""The control socket, both ends: one JSON line in, one JSON line out, then the supervisor closes.

Imports next to nothing of the rest of the supervisor, so that a command which only asks for the status stays small.
"""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH101, PTH108, PTH118

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from mlx_launcher.errors import EXIT_NOT_RUNNING, LaunchError
from mlx_launcher.supervisor.clients import Clients

SOCKET_NAME = "control.sock"
MAX_REQUEST = 65536
MAX_CLIENTS = 32

# sun_path holds 104 bytes on macOS and 108 on Linux, with the final zero.
_MAX_PATH = 103

Answer = dict[str, Any]


class NotRunning(LaunchError):  # noqa: N818 (a state, which most callers expect)
    """Nobody answers on an instance's control socket."""

    def __init__(self, instance: str) -> None:
        super().__init__(
            "not_running", f"no server runs in {instance}", "Start one with mlx-launch start", EXIT_NOT_RUNNING
        )


def call(instance: str, request: dict[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
    """Sends one request to the supervisor of an instance directory and returns its whole answer (`ok`, `data` or `error`).

    Raises NotRunning when there is no supervisor, or when it ended while we asked, and LaunchError `no_answer` when it does not
    answer within `timeout_s` seconds or answers nonsense. Changes the working directory for a moment where the path is
    longer than a socket address may be, so other threads must not depend on it.
    """
    deadline = time.monotonic() + timeout_s
    received = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.settimeout(timeout_s)
            while not _connect(sock, instance):
                if time.monotonic() >= deadline:
                    raise TimeoutError
                time.sleep(0.01)
            sock.sendall(json.dumps(request).encode() + b"\n")
            while not received.endswith(b"\n"):
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                data = sock.recv(MAX_REQUEST)
                if not data:
                    break
                received += data
        except TimeoutError as error:
            raise _no_answer(instance, f"within {timeout_s:g} s") from error
        except OSError as error:
            raise NotRunning(instance) from error
    if not received:
        raise NotRunning(instance)
    try:
        answer = json.loads(received)
    except ValueError as error:
        raise _no_answer(instance, "in a known form") from error
    if not isinstance(answer, dict):
        raise _no_answer(instance, "in a known form")
    return answer


def _no_answer(instance: str, how: str) -> LaunchError:
    hint = "It may be stopped (Ctrl-Z) or the machine overloaded; try again"
    return LaunchError("no_answer", f"the supervisor in {instance} does not answer {how}", hint)


def _connect(sock: socket.socket, instance: str) -> bool:
    """False while the listen queue is full, for which Linux does not wait."""
    path = os.path.join(instance, SOCKET_NAME)
    with contextlib.suppress(BlockingIOError):
        if len(os.fsencode(path)) <= _MAX_PATH:
            sock.connect(path)
            return True
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(instance)
            sock.connect(SOCKET_NAME)
        finally:
            os.fchdir(here)
            os.close(here)
        return True
    return False


def error_answer(code: str, message: str, hint: str = "") -> Answer:
    return {"ok": False, "error": {"code": code, "message": message, "hint": hint}}


class ControlServer:
    """Listens in the working directory, which must be the instance's. Calls `handle` for each request, in the loop.

    A file that a killed supervisor left is replaced: whoever holds the lock owns the name. Only our own user's clients, and
    root's, are heard. Raises OSError when it cannot listen.
    """

    def __init__(self, selector: selectors.BaseSelector, handle: Callable[[dict[str, Any]], Answer]) -> None:
        self._selector = selector
        self._handle = handle
        self._clients = Clients(selector, self._answer, MAX_CLIENTS, MAX_REQUEST)
        self.expire = self._clients.expire
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(SOCKET_NAME)
        os.chmod(SOCKET_NAME, 0o600)
        self._sock.listen(128)
        self._sock.setblocking(False)
        selector.register(self._sock, selectors.EVENT_READ, self._on_connect)

    def close(self) -> None:
        self._clients.close()
        self._selector.unregister(self._sock)
        self._sock.close()
        with contextlib.suppress(OSError):
            os.unlink(SOCKET_NAME)

    def _on_connect(self, _mask: int) -> None:
        self._clients.accept(self._sock, _is_ours)

    def _answer(self, request: bytes) -> bytes | None:
        line, newline, _ = request.partition(b"\n")
        if not newline and len(request) <= MAX_REQUEST:
            return None
        return json.dumps(self._respond(line)).encode() + b"\n"

    def _respond(self, line: bytes) -> Answer:
        if len(line) > MAX_REQUEST:
            return error_answer("bad_request", f"a request has at most {MAX_REQUEST} bytes")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            return error_answer("bad_request", "a request is one line with one JSON object")
        return self._handle(request)


def _is_ours(sock: socket.socket) -> bool:
    """Another user's client may have neither an answer nor one of the places."""
    from mlx_launcher import system  # here, because a command has no use for it

    if system.peer_uid(sock) in (os.geteuid(), 0):
        return True
    answer = error_answer("not_yours", "this supervisor belongs to another user")
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(json.dumps(answer).encode() + b"\n")
    sock.close()
    return False
