"""Files that grow: the supervisor's journal and the server's log. Both survive a deleted file and a full disk."""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH103, PTH105, PTH110, PTH116, PTH120, PTH121

import json
import os
import time
from collections import deque
from typing import Any

JOURNAL_MAX_BYTES = 1 << 20
KEPT = 3
TAIL = 10


def utc_now() -> str:
    """The wall clock as in CLI.md: 2026-11-22T14:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class RotatingFile:
    """Appends bytes to a file of at most `max_bytes`, with three older ones beside it (`.1` is the youngest).

    In the working directory, which is the instance's, a link is not followed and what others may read is closed to them; a file
    elsewhere is where its user wants it, and as open.

    Never raises: what cannot be written is lost, and `error` says why until a write works again, which begins a line of its own.
    A file that was deleted or moved away is begun anew, one that was truncated goes on from its new end.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.error: str | None = None
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self._within = self._torn = False  # whether the last byte ended no line, and whether what followed it was lost

    def write(self, data: bytes) -> None:
        if self._torn:  # by a full disk: the half of a line would make the next one unreadable
            data = b"\n" + data
        try:
            while data:
                room = self._max_bytes - self._open()
                cut = len(data) if len(data) <= room else data.rfind(b"\n", 0, max(room, 0)) + 1
                if not cut and room < self._max_bytes:
                    self._rotate()
                    continue
                written = os.write(self._fd, data[: cut or room])
                self._within, data = data[written - 1 : written] != b"\n", data[written:]
            self.error, self._torn = None, False
        except OSError as error:
            self.error, self._torn = error.strerror or str(error), self._within
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        """Makes sure that the descriptor is that of the file at the path; its size."""
        if self._fd >= 0:
            mine = os.fstat(self._fd)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None
            if there is not None and (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev):
                return mine.st_size
            self.close()
        os.makedirs(os.path.dirname(self._path) or ".", mode=0o700, exist_ok=True)
        here = os.path.samefile(os.path.dirname(self._path) or ".", ".")
        # O_NONBLOCK: a FIFO without a reader is then an error instead of a supervisor that stands still.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | (os.O_NOFOLLOW if here else 0)
        self._fd = os.open(self._path, flags, 0o600)
        found = os.fstat(self._fd)
        if here and found.st_mode & 0o077:
            os.fchmod(self._fd, 0o600)
        return found.st_size

    def _rotate(self) -> None:
        self.close()
        for n in range(KEPT, 0, -1):
            older = f"{self._path}.{n - 1}" if n > 1 else self._path
            if os.path.exists(older):
                os.replace(older, f"{self._path}.{n}")


class Journal:
    """One JSON line for each thing that happened: `at`, `event`, and what belongs to it. `tail` holds the last ten."""

    def __init__(self, path: str) -> None:
        self.tail: deque[dict[str, Any]] = deque(maxlen=TAIL)
        self._troubles: dict[str, str | None] = {}
        self._file = RotatingFile(path, JOURNAL_MAX_BYTES)

    def note(self, event: str, **fields: Any) -> None:
        line = {"at": utc_now(), "event": event, **fields}
        self.tail.append(line)
        self._file.write(json.dumps(line).encode() + b"\n")

    def trouble(self, what: str, why: str | None) -> None:
        """Notes a trouble when it begins and, with None, when it is over; not each time that it is met."""
        if self._troubles.get(what) != why:
            self._troubles[what] = why
            self.note(f"{what}_trouble", reason=why or "over")
