"""Bytes written to disk in a conversation of 20 turns, beside those that the tokens of its turns make in the KV cache.

    python -m benchmarks.disk [--json]

Counted are the bytes of every file that appears or grows under the state directory, the cache and all else, also of those that
are replaced or gone again, until the server has ended. What the kernel counted for the process (`wchar`) stands beside it.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.row import Row, at_most, show
from benchmarks.servers import MODEL, Ours, next_turn, user
from mlx_launcher.bench.prompt import words
from mlx_launcher.demo import build_random

TURNS = 20
WORDS = 40  # of a turn; about 230 tokens of the random model's, a byte each
ANSWER = 16
GOAL = 1.2
_LOOK_S = 0.005
_QUIET_S = 0.5  # without a byte: the turn is written, or is left for later
_PATIENCE_S = 10.0


class Watch:
    """`with Watch(folder) as watch`: how many bytes were written there; a file is its inode, so a rename adds nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._largest: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def written(self) -> int:
        return sum(self._largest.copy().values())

    def settled(self) -> int:
        """The bytes once none was added for a while."""
        seen, since, deadline = self.written, time.monotonic(), time.monotonic() + _PATIENCE_S
        while time.monotonic() < min(since + _QUIET_S, deadline):
            time.sleep(_LOOK_S)
            if self.written != seen:
                seen, since = self.written, time.monotonic()
        return seen

    def _loop(self) -> None:
        while not self._over.wait(_LOOK_S):
            self._look(os.fspath(self._folder))

    def _look(self, folder: str) -> None:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        self._look(entry.path)
                    else:
                        found = entry.stat(follow_symlinks=False)
                        self._largest[found.st_ino] = max(self._largest.get(found.st_ino, 0), found.st_size)


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        model = build_random(Path(directory) / "random")
        ours = Ours(model, Path(directory))
        try:
            return [_row(ours, _bytes_of_a_token(model))]
        finally:
            ours.close()


def _row(ours: Ours, token_bytes: int) -> Row:
    server = psutil.Process(ours.launcher.server_pid())
    before = _wchar(server)
    talk = [user(words(1, WORDS))]
    parts: list[float] = []
    told, was = 0, 0
    with Watch(ours.launcher.state_dir) as everything:
        base = everything.settled()
        for turn in range(TURNS):
            answer = ours.ask(talk, ANSWER)
            assert answer.prompt_tokens is not None
            assert answer.completion_tokens is not None
            tokens = answer.prompt_tokens + answer.completion_tokens - told
            told += tokens
            now = everything.settled() - base
            parts.append((now - was) / (tokens * token_bytes))
            was = now
            talk = next_turn(talk, answer, words(turn + 2, WORDS))
        kernel = None if before is None else (_wchar(server) or 0) - before
        done = ours.launcher.command("stop")
        assert done.returncode == 0, done.stderr
        written = everything.settled() - base
    said = "" if kernel is None else f" (wchar of the process until it was ended: {kernel / 1e6:.2f} MB)"
    needed = told * token_bytes
    detail = (
        f"{written / 1e6:.2f} MB written{said} against {needed / 1e6:.2f} MB for {told:,} tokens of {token_bytes:,} bytes; "
        f"by turn {min(parts):.2f} to {max(parts):.2f}, median {statistics.median(parts):.2f}; {TURNS} turns, {MODEL}"
    )
    what = f"bytes written to disk per turn, {TURNS}-turn conversation"
    return at_most(what, "the bytes of the turn's new tokens", GOAL, written / needed, detail)


def _bytes_of_a_token(model: Path) -> int:
    """Keys and values of all layers."""
    config = json.loads((model / "config.json").read_bytes())
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[config["torch_dtype"]]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * size)


def _wchar(process: psutil.Process) -> int | None:
    """Bytes that a process handed to write(2), sockets and logs too; None where the kernel does not count (macOS)."""
    if sys.platform != "linux":
        return None
    for line in Path(f"/proc/{process.pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return None


if __name__ == "__main__":
    show(measure())
