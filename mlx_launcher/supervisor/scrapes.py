"""The page of `metricsPort`: HTTP for one path, in the supervisor's loop, so that who looks wakes no model.

Loopback only, and as bounded as the control socket: no client can hold up another one, or the loop.
"""

import contextlib
import selectors
import socket
from collections.abc import Callable

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor.clients import Clients
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import bind_all
from mlx_launcher.supervisor.metrics import CONTENT_TYPE

HOSTS = ["127.0.0.1", "::1"]
PATH = "/metrics"
MAX_REQUEST = 8192
MAX_CLIENTS = 16

# What a browser says of a request that no page made (somebody typed the address), or a page of this very server.
_NO_STRANGER = frozenset(("none", "same-origin"))
_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}


class Scrapes:
    """Answers with what `render` gives. Until `listen` there is no port; `problem` says why not, where there should be one."""

    def __init__(self, selector: selectors.BaseSelector, journal: Journal, render: Callable[[], str]) -> None:
        self.problem: str | None = None
        self._selector, self._journal, self._render = selector, journal, render
        self._port: int | None = None
        self._listeners: list[socket.socket] = []
        self._clients = Clients(selector, self._answer, MAX_CLIENTS, MAX_REQUEST)
        self.expire = self._clients.expire

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
            self._selector.register(sock, selectors.EVENT_READ, lambda mask, sock=sock: self._clients.accept(sock))

    def follow(self, port: int | None) -> None:
        """As `listen`, for a plan that a server is started by: what cannot be bound is noted, and no reason to refuse service."""
        with contextlib.suppress(LaunchError):
            self.listen(port)
        self._journal.trouble("metrics", self.problem)

    def close(self) -> None:
        self._forget_port()
        self._clients.close()

    def _forget_port(self) -> None:
        for sock in self._listeners:
            self._selector.unregister(sock)
            sock.close()
        self._listeners, self.problem = [], None

    def _answer(self, request: bytes) -> bytes | None:
        head, end, _ = request.partition(b"\r\n\r\n")
        if not end and len(request) <= MAX_REQUEST:
            return None
        status = look(head) if end else 400
        body = self._render() if status == 200 else f"{_REASONS[status]}: GET {PATH} is all there is\n"
        return _response(status, body.encode())


def look(head: bytes) -> int:
    """The status for a request of this head.

    A web page gets nothing, by the same rule as of host/access.py: its `Host` has to be one that nobody can rebind, its `Origin`
    this very server's, and a browser's `Sec-Fetch-Site` must not say that a page of elsewhere asks. A scraper sends neither.
    """
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    given: dict[str, list[str]] = {"host": [], "origin": [], "sec-fetch-site": []}
    for field in fields:
        name, _, value = field.partition(":")
        given.get(name.lower(), []).append(value.strip().lower())
    hosts = given["host"]
    if any(_bare(host) not in ("localhost", *HOSTS) for host in hosts):
        return 403
    own = [f"http://{host}" for host in hosts]
    if any([origin] != own for origin in given["origin"]) or not _NO_STRANGER.issuperset(given["sec-fetch-site"]):
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
