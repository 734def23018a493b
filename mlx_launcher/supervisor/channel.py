"""The supervisor's end of the channel to the host: JSON lines on a socket, never blocking in either direction."""

import json
import socket
from typing import Any

MAX_LINE = 65536


class Channel:
    """`receive` gives whole messages; `send` keeps what the socket does not take until `flush`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.ended = False  # the other end is closed
        self.dropped = 0  # lines that were too long or no JSON objects
        self._in = b""
        self._out = b""
        self._skipping = False  # inside a line that is too long

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out)

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; one read, so that a flood on this channel cannot hold up the loop."""
        try:
            data = self.sock.recv(MAX_LINE)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.ended = True
        *lines, self._in = (self._in + data).split(b"\n")
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        if len(self._in) > MAX_LINE or self._skipping:
            self.dropped += not self._skipping
            self._in, self._skipping = b"", True
        return [message for line in lines if (message := self._parse(line)) is not None]

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        try:
            message = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            return message
        self.dropped += 1
        return None

    def send(self, message: dict[str, Any]) -> None:
        if not self.ended:
            self._out += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        try:
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:  # the host is gone; waitpid will tell
            self._out = b""

    def close(self) -> None:
        self.sock.close()
