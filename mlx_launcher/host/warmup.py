"""Prompts that are run through the model before somebody asks: the day's first request is then a follow-up."""

import logging
import os
import stat
from collections import deque
from pathlib import Path

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.requests import Generation, parse_chat

log = logging.getLogger("mlx_launcher.host")

# A context of 200,000 tokens is some 800 kB of text. It is split into tokens in one piece, and who asks meanwhile waits for that.
MAX_BYTES = 1 << 20


class Warmup:
    """The files that are still to be run, each with the body of a chat request as a client sends it."""

    def __init__(self, files: list[str]) -> None:
        self._files = deque(Path(file) for file in files)
        self._in_all = len(files)
        self._failed: list[str] = []

    def next(self) -> Generation | None:
        """The request whose turn it is; None when nothing is left. What cannot be used is passed over, and noted."""
        while self._files:
            try:
                return parse_chat(_read(self._files[0]))[1]
            except OSError as error:
                self.skip(error.strerror or str(error))
            except RequestError as error:
                self.skip(error.message)
        return None

    def done(self) -> None:
        """The request of `next` is in the cache."""
        self._files.popleft()

    def skip(self, why: str) -> None:
        """The request of `next` cannot be run."""
        self._failed.append(f"warmup: {self._files.popleft()}: {why}")
        log.warning("%s", self._failed[-1])

    def notes(self) -> list[str]:
        """What `status` says of it; nothing once everything is done."""
        left = len(self._files)
        return ([f"warmup: {self._in_all - left} of {self._in_all} prompts are done"] if left else []) + self._failed


def _read(file: Path) -> bytes:
    """Raises OSError, or RequestError for what is no file that could be meant; a FIFO is not waited for."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as opened:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise RequestError(400, "it is no regular file")
        if about.st_size > MAX_BYTES:
            raise RequestError(400, f"it is larger than {MAX_BYTES >> 20} MiB")
        return opened.read(MAX_BYTES)
