"""The page of `metricsPort`: HTTP for one path, in the supervisor's loop, so that who looks wakes no model.

Loopback only, and as bounded as the control socket: no client can hold up another one, or the loop.
"""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import bind_all
from mlx_launcher.supervisor.metrics import CONTENT_TYPE

HOSTS = ["127.0.0.1", "::1"]
PATH = "/metrics"
MAX_REQUEST = 8192
MAX_CLIENTS = 16
CLIENT_S = 5.0  # to send the request, and again to take the answer

_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}


class Scrapes:
    """Answers with what `render` gives. Until `listen` there is no port; `problem` says why not, where there should be one."""

    def __init__(self, selector: selectors.BaseSelector, journal: Journal, render: Callable[[], str]) -> None:
        self.problem: str | None = None
        self._selector, self._journal, self._render = selector, journal, render
        self._port: int | None = None
        self._listeners: list[socket.socket] = []
        self._clients: dict[_Client, None] = {}  # oldest first

    @property
    def seen(self) -> dict[str, str | None] | None:
        """What `status` shows of it."""
        return {"url": f"http://127.0.0.1:{self._port}{PATH}", "problem": self.problem} if self._port else None

    def listen(self, port: int | None) -> None:
        """Answers on this port from now on, and on no other. LaunchError as listener.bind_all, where it cannot be bound."""
        if port == self._port and self._listeners:
            return
        self._forget_port()
        self._port = port
        if port is None:
            return
        try:
            self._listeners = bind_all(HOSTS, port, self._journal.note)
        except LaunchError as error:
            self.problem = error.message
            hint = "Stop it, or change metricsPort in the configuration"
            raise LaunchError(error.code, f"metricsPort: {error.message}", hint, error.exit_code) from error
        for sock in self._listeners:
            self._selector.register(sock, selectors.EVENT_READ, lambda mask, sock=sock: self._on_connect(sock))

    def follow(self, port: int | None) -> None:
        """As `listen`, for a plan that a server is started by: what cannot be bound is noted, and no reason to refuse service."""
        with contextlib.suppress(LaunchError):
            self.listen(port)
        self._journal.trouble("metrics", self.problem)

    def expire(self, now: float) -> None:
        """Drops the clients that took too long. `now` is time.monotonic()."""
        for client in [c for c in self._clients if now >= c.deadline]:
            self._drop(client)

    def close(self) -> None:
        self._forget_port()
        for client in list(self._clients):
            self._drop(client)

    def _forget_port(self) -> None:
        for sock in self._listeners:
            self._selector.unregister(sock)
            sock.close()
        self._listeners, self.problem = [], None

    def _on_connect(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # out of descriptors, or a client that is already gone
            if self._clients:
                self._drop(next(iter(self._clients)))
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
        head, end, _ = client.request.partition(b"\r\n\r\n")
        if not end and len(client.request) <= MAX_REQUEST:
            return
        status = look(head) if end else 400
        body = self._render() if status == 200 else f"{_REASONS[status]}: GET {PATH} is all there is\n"
        client.answer = _response(status, body.encode())
        client.deadline = time.monotonic() + CLIENT_S
        self._selector.modify(client.sock, selectors.EVENT_WRITE, lambda mask: self._on_client(client))

    def _drop(self, client: "_Client") -> None:
        del self._clients[client]
        self._selector.unregister(client.sock)
        client.sock.close()


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = b""
        self.answer: bytes | None = None
        self.deadline = time.monotonic() + CLIENT_S


def look(head: bytes) -> int:
    """The status for a request of this head.

    A `Host` has to be one that nobody can rebind: else a web page whose name is made to lead here could read the answer.
    """
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    pairs = [field.partition(":") for field in fields]
    hosts = [value.strip().lower() for name, _, value in pairs if name.lower() == "host"]
    if any(_bare(host) not in ("localhost", *HOSTS) for host in hosts):
        return 403
    if words[1].partition("?")[0] != PATH:
        return 404
    return 200 if words[0] == "GET" else 405


def _bare(host: str) -> str:
    """Without its port: of "[::1]:9090" it is "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _response(status: int, body: bytes) -> bytes:
    kind = CONTENT_TYPE if status == 200 else "text/plain; charset=utf-8"
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += ["Allow: GET"] if status == 405 else []
    return "\r\n".join([*lines, "Cache-Control: no-store", "Connection: close", "", ""]).encode() + body
