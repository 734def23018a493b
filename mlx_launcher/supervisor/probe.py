"""Whether a server without a channel works: it is asked for one token, through the port that users take, then if it is there."""

import errno
import json
import selectors
import socket
from collections.abc import Callable
from typing import Any

RETRY_S = 0.5
# The first token of a large model that is loaded by the first request: minutes. A server that hangs is asked again after it.
PATIENCE_S = 600.0
MAX_ANSWER = 1 << 20
# Between two looks at a server that is ready: its log should not be full of them.
LOOK_S = 10.0

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (a wildcard is no address to connect to)


class Probe:
    """Asks until the answer is a completion. `hear` gets what a host would say of itself: its phases, then `ready`.

    A server that answers without its model (anyclaude's legacy server sends a demo text then) is found out by its /health,
    if it has one. Refused, silent, or any other answer: still starting, asked again.

    After `watch` it is asked for /health alone, every `look_s` seconds or LOOK_S: any answer is `answered`; two refusals for each
    address are `refused`; no answer is nothing, for who is busy does not answer either, and neither is what we lack ourselves: an
    address, a descriptor.
    `poll` wants to be called at `due` and after every event; its times are seconds on the loop's clock.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        hosts: list[str],
        port: int,
        settings: dict[str, Any],
        hear: Callable[[dict[str, Any]], None],
        look_s: float = 0.0,
    ) -> None:
        self.due: float | None = None
        self._selector = selector
        self._hosts = [_LOOPBACK.get(host, host) for host in hosts]
        self._port = port
        self._completion = _chat_request(_authority(self._hosts[0], port), settings)
        self._health = f"GET /health HTTP/1.0\r\nHost: {_authority(self._hosts[0], port)}\r\n\r\n".encode()
        self._request = self._completion
        self._hear = hear
        self._sock: socket.socket | None = None
        self._unsent = b""
        self._answer = b""
        self._watching = False
        self._look_s = min(look_s or LOOK_S, LOOK_S)
        self._refusals = 0

    def poll(self, now: float) -> None:
        """Begins the next attempt when it is time for it."""
        if self.due is None:
            self.due = now + (self._look_s if self._watching and not self._refusals else RETRY_S)
        elif now >= self.due:
            self._give_up()
            self._connect()
            self.due = None if self._sock is None else now + PATIENCE_S

    def watch(self) -> None:
        """It gave a token."""
        self._give_up()
        self._watching, self._request = True, self._health

    def close(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        """Ends an attempt; the next begins RETRY_S after the next `poll`."""
        self.due = None
        if self._sock is not None:
            self._selector.unregister(self._sock)
            self._sock.close()
            self._sock = None

    def _connect(self) -> None:
        try:
            self._sock = _connecting(self._hosts[0], self._port)
        except OSError as error:
            self._failed(error)
            return
        self._unsent, self._answer = self._request, b""
        self._selector.register(self._sock, selectors.EVENT_WRITE, self._on_event)

    def _on_event(self, mask: int) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                self._send(sock)
            if mask & selectors.EVENT_READ:
                self._receive(sock)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Refused, or reset: it is not there yet, or not any more."""
        self._hosts.append(self._hosts.pop(0))  # it may listen on another address only
        self._give_up()
        if not self._watching or not isinstance(error, ConnectionRefusedError):
            return
        self._refusals += 1
        if self._refusals >= 2 * len(self._hosts):
            self._hear({"type": "refused"})

    def _send(self, sock: socket.socket) -> None:
        if failed := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(failed, "connect")
        if self._unsent is self._request and not self._watching:
            self._hear({"type": "phase", "phase": "proving"})
        self._unsent = self._unsent[sock.send(self._unsent) :]
        if not self._unsent:
            self._selector.modify(sock, selectors.EVENT_READ, self._on_event)

    def _receive(self, sock: socket.socket) -> None:
        data = sock.recv(65536)
        if self._watching:
            self._give_up()
            if data:
                self._refusals = 0
                self._hear({"type": "answered"})
            return
        self._answer += data
        if data and len(self._answer) <= MAX_ANSWER and not _is_whole(self._answer):
            return
        self._give_up()
        asked, self._request = self._request, self._completion
        why = lacks_model(self._answer) if asked is self._health else shortcoming(self._answer)
        if why:
            self._hear({"type": "unproved", "reason": why})
        elif asked is self._health:
            self._hear({"type": "ready"})
        else:
            self._request, self.due = self._health, 0.0  # at once


def _connecting(host: str, port: int) -> socket.socket:
    """A socket on its way there. Raises OSError: ConnectionRefusedError where nobody listens."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # Bound first: a connect to a free port of the ephemeral range could else draw that very port and meet itself.
        sock.bind((host, 0))
        code = errno.ECONNREFUSED if sock.getsockname()[1] == port else sock.connect_ex((host, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, "connect")
    except BaseException:
        sock.close()
        raise
    return sock


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _chat_request(authority: str, settings: dict[str, Any]) -> bytes:
    body = json.dumps(
        {
            "model": settings.get("model_id"),
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        }
    ).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.0",  # 1.0: the answer comes in one piece and ends with the connection
        f"Host: {authority}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    if key := settings.get("api_key"):
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace") + body


def _is_whole(answer: bytes) -> bool:
    """Whether all that the headers promise is there; without a promise, the end of the connection tells."""
    head, end, body = answer.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:] if end else []:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return len(body) >= int(value)
    return False


def shortcoming(answer: bytes) -> str | None:
    """Why an HTTP answer is no completion, in words without anything of its body; None for one that is."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split(b" ", 2)
    if not answer:
        return "it closed the connection without an answer"
    if len(status) < 2 or not status[0].startswith(b"HTTP/"):
        return "its answer is not HTTP"
    if status[1] != b"200":
        return f"it answers a chat request with HTTP {status[1][:3].decode('ascii', 'replace')}"
    completion = _body(answer)
    if completion is None:
        return "its answer to a chat request is not JSON"
    choices = completion.get("choices") if isinstance(completion, dict) else None
    return None if isinstance(choices, list) and choices else "its answer to a chat request has no choices"


def lacks_model(answer: bytes) -> str | None:
    """What an answer of /health says against the server; None where it has no such page or says nothing of a model."""
    health = _body(answer)
    if isinstance(health, dict) and health.get("model_loaded") is False:
        return "its /health says that no model is loaded"
    return None


def _body(answer: bytes) -> Any:
    """The JSON of an answer; None where it has none."""
    try:
        return json.loads(answer.partition(b"\r\n\r\n")[2])
    except (ValueError, RecursionError):
        return None
