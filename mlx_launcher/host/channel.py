"""The host's end of the channel to its supervisor: JSON lines over one socket, read on a thread of its own."""

import contextlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


class Channel:
    """Sends without ever blocking, receives on a daemon thread, and says when the supervisor is gone.

    `send` may be called from any thread. While the supervisor does not read, what matters waits in memory (a handful of
    messages in a host's life) and beats are dropped.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()

    def listen(self, on_message: Callable[[Message], object], on_gone: Callable[[], object]) -> None:
        """Starts the thread that calls `on_message` for each line, and `on_gone` once at end of file. Both run on that thread."""
        threading.Thread(target=self._read, args=(on_message, on_gone), name="channel", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends, or keeps for the next call what the socket does not take now; a beat that would have to wait is dropped."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._pending and message["type"] == "beat":
                self._flush()
                if self._pending:
                    return
            self._pending.append(line)
            self._flush()

    def _flush(self) -> None:
        while self._pending:
            line = self._pending[0]
            try:
                sent = self._socket.send(line, socket.MSG_DONTWAIT)
            except OSError:
                return
            if sent < len(line):
                # The rest of a begun line has to follow, whatever it is: a cut line would garble the next one.
                self._pending[0] = line[sent:]
                return
            self._pending.popleft()

    def _read(self, on_message: Callable[[Message], object], on_gone: Callable[[], object]) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    on_message(json.loads(line))
        on_gone()
