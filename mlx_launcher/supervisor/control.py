"""The control socket, both ends: one JSON line in, one JSON line out, then the supervisor closes.

Imports nothing of the rest of the supervisor, so that a command which only asks for the status stays small.
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

SOCKET_NAME = "control.sock"
MAX_REQUEST = 65536
MAX_CLIENTS = 32
CLIENT_S = 5.0  # to send the request, and again to take the answer

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

    A file that a killed supervisor left is replaced: whoever holds the lock owns the name. No client can hold up another one:
    when there are too many, the oldest, which has had its chance, is dropped. Only our own user's clients, and root's, are heard.
    Raises OSError when it cannot listen.
    """

    def __init__(self, selector: selectors.BaseSelector, handle: Callable[[dict[str, Any]], Answer]) -> None:
        self._selector = selector
        self._handle = handle
        self._clients: dict[_Client, None] = {}  # oldest first
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(SOCKET_NAME)
        os.chmod(SOCKET_NAME, 0o600)
        self._sock.listen(128)
        self._sock.setblocking(False)
        selector.register(self._sock, selectors.EVENT_READ, self._on_connect)

    def expire(self, now: float) -> None:
        """Drops the clients that took too long. `now` is time.monotonic()."""
        for client in [c for c in self._clients if now >= c.deadline]:
            self._drop(client)

    def close(self) -> None:
        for client in list(self._clients):
            self._drop(client)
        self._selector.unregister(self._sock)
        self._sock.close()
        with contextlib.suppress(OSError):
            os.unlink(SOCKET_NAME)

    def _on_connect(self, _mask: int) -> None:
        from mlx_launcher import system  # here, because a command has no use for it

        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:  # out of descriptors, or a client that is already gone
            if self._clients:
                self._drop(next(iter(self._clients)))
            return
        if system.peer_uid(sock) not in (os.geteuid(), 0):
            _turn_away(sock)
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients)))
        sock.setblocking(False)
        client = _Client(sock)
        self._clients[client] = None
        self._selector.register(sock, selectors.EVENT_READ, lambda mask: self._on_client(client))

    def _on_client(self, client: "_Client") -> None:
        if client not in self._clients:  # dropped by an earlier event of the same round
            return
        try:
            if client.answer is None:
                self._read(client)
            if client.answer is not None:
                client.answer = client.answer[client.sock.send(client.answer) :]
                if not client.answer:
                    self._drop(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _read(self, client: "_Client") -> None:
        data = client.sock.recv(MAX_REQUEST)
        if not data:
            self._drop(client)
            return
        client.request += data
        line, newline, _ = client.request.partition(b"\n")
        if not newline and len(client.request) <= MAX_REQUEST:
            return
        client.answer = json.dumps(self._respond(line)).encode() + b"\n"
        client.deadline = time.monotonic() + CLIENT_S
        self._selector.modify(client.sock, selectors.EVENT_WRITE, lambda mask: self._on_client(client))

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

    def _drop(self, client: "_Client") -> None:
        del self._clients[client]
        self._selector.unregister(client.sock)
        client.sock.close()


def _turn_away(sock: socket.socket) -> None:
    """Another user's client, who may have neither an answer nor one of the places."""
    answer = error_answer("not_yours", "this supervisor belongs to another user")
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(json.dumps(answer).encode() + b"\n")
    sock.close()


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = b""
        self.answer: bytes | None = None
        self.deadline = time.monotonic() + CLIENT_S
