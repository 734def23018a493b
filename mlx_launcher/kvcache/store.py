"""The KV cache on disk: many prompts' states, the longest match wins. Files only; what is in them is the host's business.

An entry is one safetensors file that names its own tokens in its metadata, so there is no index that could be torn. It is
written whole or not at all; one that is torn all the same is set aside when it is found.
"""

import contextlib
import logging
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_launcher.kvcache.files import remove_leftovers, set_aside, write_atomically
from mlx_launcher.models.safetensors import TornFileError, read_metadata

log = logging.getLogger(__name__)

WIDTH = array("i").itemsize

# mlx-textgen's rule (`replace_threshold`, `max_reprocess_tokens`): what differs from a kept prompt by so little is not kept too.
ALIKE_SHARE = 0.95
ALIKE_TOKENS = 250


@dataclass
class Entry:
    """One kept state. `trimmable`: the state of any shorter prefix can be had from it; else it serves only as a whole."""

    path: Path
    tokens: bytes  # as `pack` makes them: comparing them costs a memcmp
    trimmable: bool
    used_at: float
    size: int

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens) // WIDTH

    def touch(self) -> None:
        """Counts as used now, also for the next process."""
        self.used_at = time.time()
        with contextlib.suppress(OSError):
            os.utime(self.path)


class Store:
    """The entries of one directory, at most `slots`, of at least `min_tokens` tokens; least recently used ones go first.

    One process at a time may use a directory; one thread may call what changes it.
    """

    def __init__(self, directory: Path, slots: int, min_tokens: int) -> None:
        self.directory = directory
        self.min_tokens = min_tokens
        self._slots = slots
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_leftovers(directory)
        self._entries = [entry for path in directory.glob("*.safetensors") if (entry := self._read(path))]

    def find(self, tokens: Sequence[int]) -> tuple[Entry, int] | None:
        """The entry that saves most of this prompt, and how many of its tokens; never all, because one has to be run."""
        wanted = pack(tokens)
        best: tuple[Entry, int] | None = None
        for entry in self._entries:
            shared = min(common_prefix(entry.tokens, wanted), len(tokens) - 1)
            if not entry.trimmable and shared < entry.length:
                continue
            # Reading an entry to save a handful of tokens would cost more than they do.
            if shared >= max(self.min_tokens, best[1] + 1 if best else 1):
                best = entry, shared
        if best:
            best[0].touch()
        return best

    def add(self, tokens: Sequence[int], trimmable: bool, write: Callable[[Path], None]) -> None:
        """Keeps a state; `write` fills the file. Nothing is written for what is too short or covered by what is kept.

        Raises OSError where the disk does not take it; what was kept before is then kept still.
        """
        new = pack(tokens)
        if len(tokens) < self.min_tokens or self._covers(new, trimmable):
            return
        path = self.directory / f"{sha256(new).hexdigest()[:24]}.safetensors"
        write_atomically(path, write)
        self._entries.append(Entry(path, new, trimmable, time.time(), path.stat().st_size))
        superseded = [
            entry for entry in self._entries[:-1] if trimmable and entry.trimmable and new.startswith(entry.tokens)
        ]
        for entry in superseded:
            self.remove(entry)
        for entry in sorted(self._entries, key=lambda entry: entry.used_at)[: -self._slots]:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        entry.path.unlink(missing_ok=True)

    def set_aside(self, entry: Entry) -> None:
        """Takes an entry that proved unreadable out of use, and keeps its file for whoever wants to know."""
        self._entries.remove(entry)
        if entry.path.exists():
            set_aside(entry.path)

    def summary(self) -> dict[str, Any]:
        """What `status` shows; safe to be called from another thread."""
        entries = list(self._entries)
        return {
            "dir": str(self.directory),
            "entries": len(entries),
            "bytes": sum(entry.size for entry in entries),
            "limit_bytes": None,
        }

    def _covers(self, new: bytes, trimmable: bool) -> bool:
        for entry in self._entries:
            if trimmable and entry.trimmable:
                count = len(new) // WIDTH
                enough = max(ALIKE_SHARE * count, count - ALIKE_TOKENS)
                alike = len(entry.tokens) >= len(new) and common_prefix(entry.tokens, new) >= enough
            else:
                alike = entry.tokens == new
            if alike:
                entry.touch()
                return True
        return False

    def _read(self, path: Path) -> Entry | None:
        try:
            metadata = read_metadata(path)
            tokens = pack(list(map(int, metadata["0.tokens"].split())))
            trimmable = metadata["0.trimmable"] == "1"
        except (TornFileError, KeyError, ValueError, OverflowError) as error:
            log.warning("a KV cache entry is torn and set aside: %s", error)
            set_aside(path)
            return None
        stat = path.stat()
        return Entry(path, tokens, trimmable, stat.st_mtime, stat.st_size)


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as 32-bit integers."""
    return array("i", tokens).tobytes()


def common_prefix(a: bytes, b: bytes) -> int:
    """How many tokens two packed prompts share from the start, found by comparing halves: most of 18k tokens are alike."""
    low, high = 0, min(len(a), len(b)) // WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * WIDTH : middle * WIDTH] == b[low * WIDTH : middle * WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low
