"""Reading the end of a log that somebody else writes, rotates, deletes or moves."""

import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SUFFIXES = (".3", ".2", ".1", "")  # oldest first; the supervisor keeps three old ones
_BLOCK = 64 * 1024
_POLL_MS = 200


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log, going back into rotated files where needed. No file: no lines."""
    lines: list[bytes] = []
    for suffix in reversed(_SUFFIXES):
        if len(lines) >= count:
            break
        if file := _open(path, suffix):
            with file:
                file.seek(_start_of_last(file, count - len(lines)))
                lines = file.read().splitlines() + lines
    return [line.decode("utf-8", "replace") for line in lines]


def follow(path: Path, count: int, stdout: int) -> Iterator[bytes]:
    """The last `count` lines of a log, then what is written to it as it comes; the log may be rotated, or not exist yet.

    Ends when nobody is left at the other end of the descriptor `stdout`: without that it would wait for the next line.
    """
    reader = _watch(stdout)
    file = _open(path, "")
    if file:
        file.seek(_start_of_last(file, count))
    while True:
        if file:
            yield from _rest(file)
        for newer in _successors(file, path):
            if file:
                yield from _rest(file)  # what came between the last look and the rotation
                file.close()
            file = newer
            yield from _rest(file)
        if reader.poll(_POLL_MS):
            return


def _rest(file: BinaryIO) -> Iterator[bytes]:
    if os.fstat(file.fileno()).st_size < file.tell():
        file.seek(0)  # emptied under us
    while block := file.read(_BLOCK):
        yield block


def _successors(file: BinaryIO | None, path: Path) -> list[BinaryIO]:
    """The files that came after `file`, oldest first: more than one if the log was rotated twice since the last look."""
    if file and _is_at(file, path):
        return []
    found = [opened for suffix in _SUFFIXES if (opened := _open(path, suffix))]
    if file is None:
        newer = [opened for opened in found if _is_at(opened, path)]
    else:
        ours = [index for index, opened in enumerate(found) if os.path.sameopenfile(opened.fileno(), file.fileno())]
        # Deleted, or moved out of the row: only the newest is certain to be unread.
        newer = found[ours[-1] + 1 :] if ours else found[-1:]
    for opened in found:
        if opened not in newer:
            opened.close()
    return newer


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _open(path: Path, suffix: str) -> BinaryIO | None:
    """None for what is no file either: a terminal has no end to read, and a pipe would be waited for."""
    try:
        file = os.fdopen(os.open(f"{path}{suffix}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    return None


def _start_of_last(file: BinaryIO, count: int) -> int:
    """Where the last `count` lines begin, found from the end: a log may be long."""
    end = position = file.seek(0, os.SEEK_END)
    if count == 0:
        return end
    while position > 0:
        base = max(0, position - _BLOCK)
        file.seek(base)
        block = file.read(position - base)
        at = len(block)
        if position == end and block.endswith(b"\n"):
            at -= 1  # ends the last line, begins none
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            count -= 1
            if count == 0:
                return base + at + 1
        position = base
    return 0


def _watch(stdout: int) -> "select.poll":
    """Something to sleep on that wakes up when the reader of a pipe goes away. A terminal or a file cannot."""
    reader = select.poll()
    mode = os.fstat(stdout).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        reader.register(stdout, 0)
    return reader
