"""Prompts that are run through the model before somebody asks: the day's first request is then a follow-up."""

from collections import deque
from pathlib import Path

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.requests import Generation, parse_chat


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
                return parse_chat(self._files[0].read_bytes())[1]
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

    def notes(self) -> list[str]:
        """What `status` says of it; nothing once everything is done."""
        left = len(self._files)
        return ([f"warmup: {self._in_all - left} of {self._in_all} prompts are done"] if left else []) + self._failed
