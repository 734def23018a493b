"""Who asks the supervisor: one request, one answer, and the end. No client can hold up another one, or the loop."""

import selectors
import socket
import time
from collections.abc import Callable

CLIENT_S = 5.0  # to send the request, and again to take the answer


class Clients:
    """At most `most` at a time: of more, the oldest, which has had its chance, is dropped.

    `answer(what came so far)` gives the answer to a request, None as long as it is not whole; of a request of more than
    `max_request` bytes it has to give one.
    """

    def __init__(
        self, selector: selectors.BaseSelector, answer: Callable[[bytes], bytes | None], most: int, max_request: int
    ) -> None:
        self._selector, self._answer = selector, answer
        self._most, self._max_request = most, max_request
        self._clients: dict[_Client, None] = {}  # oldest first

    def accept(self, listener: socket.socket, admit: Callable[[socket.socket], bool] = lambda sock: True) -> None:
        """Takes in who waits at a listener; whom `admit` refuses it has dealt with."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # nobody waits, or nobody any more
            return
        except OSError:  # out of descriptors
            if self._clients:
                self._drop(next(iter(self._clients)))
            return
        if not admit(sock):
            return
        if len(self._clients) >= self._most:
            self._drop(next(iter(self._clients)))
        sock.setblocking(False)
        client = _Client(sock)
        self._clients[client] = None
        self._selector.register(sock, selectors.EVENT_READ, lambda mask: self._on_client(client))

    def expire(self, now: float) -> None:
        """Drops those that took too long. `now` is time.monotonic()."""
        for client in [c for c in self._clients if now >= c.deadline]:
            self._drop(client)

    def close(self) -> None:
        for client in list(self._clients):
            self._drop(client)

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
        data = client.sock.recv(self._max_request)
        if not data:
            self._drop(client)
            return
        client.request += data
        client.answer = self._answer(client.request)
        if client.answer is not None:
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
