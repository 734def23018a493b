"""The KV cache of one model on disk: many prompts' states, the longest match wins. Files only; what is in them is the host's.

A segment is one safetensors file that names its own tokens and its parent, so there is no index that could be torn. It is
written whole or not at all; one that is torn all the same is set aside when it is found, with what goes on from it.
"""

import base64
import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.kvcache.files import (
    ABOUT,
    SUFFIX,
    Entry,
    FolderLock,
    Tensor,
    entries,
    folders,
    read_about,
    remove_leftovers,
    set_aside,
    write_atomically,
)
from mlx_launcher.kvcache.tree import WIDTH, Segment, Tree, pack
from mlx_launcher.models.safetensors import TornFileError

log = logging.getLogger(__name__)

# What other programs may still write when the cache has taken its share of a disk.
MIN_FREE_BYTES = 1 << 30
# Where the user sets no bound.
MAX_BYTES = 40_000_000_000
FREE_SHARE = 4
# A folder is one server's; a second server of the same model takes the next one, up to this many.
FOLDERS = 16


class Limits(NamedTuple):
    """`max_bytes`: of all models' folders under one root together. `slots`: conversations kept for one model."""

    slots: int
    min_tokens: int
    max_bytes: int


class Match(NamedTuple):
    """A kept state, and how many of the prompt's tokens can be taken from it; never all, because one has to be run."""

    segment: Segment
    usable: int


def open_store(root: Path, fingerprint: str, limits: Limits) -> "Store":
    """The store of a model, in the first folder of it that no other process uses. Raises OSError where it cannot be written."""
    for number in range(1, FOLDERS + 1):
        with contextlib.suppress(BlockingIOError):
            return Store(root / (fingerprint if number == 1 else f"{fingerprint}-{number}"), limits)
    raise BlockingIOError(f"{FOLDERS} servers of this model use {root} already")


class Store:
    """One folder, locked while it is open. One thread may call what changes it.

    Raises BlockingIOError where another process has the folder, and any other OSError where it cannot be used.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.limits = limits
        self.torn = 0  # set aside since it was opened
        self._lock = FolderLock(directory)
        remove_leftovers(directory)
        self._tree = Tree()
        self._read_all()
        self._bytes = sum(segment.size for segment in self._tree)
        self._count = len(self._tree.ends())

    def close(self) -> None:
        self._lock.release()

    def describe(self, model: str, path: Path) -> None:
        """Notes whose states these are. Not having it costs nothing but the name in a list."""
        text = json.dumps({"model": model, "path": str(path)}, ensure_ascii=False)
        with contextlib.suppress(OSError):
            write_atomically(self.directory / ABOUT, lambda file: file.write(text.encode()))

    def find(self, tokens: Sequence[int]) -> Match | None:
        """What saves most of this prompt, at least the limits' `min_tokens`; it counts as used now."""
        wanted = pack(tokens)
        segment, shared = self._tree.longest(wanted)
        whole = self._tree.longest_whole(wanted[: -1 * WIDTH])
        if whole is not None and whole.end > shared:
            segment, shared = whole, whole.end
        usable = min(shared, len(tokens) - 1)
        if segment is None or usable < max(self.limits.min_tokens, 1):
            return None
        self._touch(segment)
        return Match(segment, usable)

    def held(self, tokens: Sequence[int]) -> Match | None:
        """The line that a further segment of these tokens goes on from: it holds the first `usable` of them.

        None where they share so little that keeping the one for the other's sake would cost more than it saves.
        """
        segment, shared = self._tree.longest(pack(tokens))
        return Match(segment, shared) if segment and shared >= self.limits.min_tokens else None

    def has_whole(self, tokens: Sequence[int]) -> bool:
        wanted = pack(tokens)
        return any(segment.whole and segment.tokens == wanted for segment in self._tree.roots)

    def add(self, after: Match | None, tokens: Sequence[int], tensors: Iterable[Tensor]) -> bool:
        """Keeps the keys and values of `tokens`, which follow the first `after.usable` ones of a line; False without room.

        Raises OSError where the disk does not take it; what was kept before is then kept still.
        """
        parent, start = after or (None, 0)
        return self._write(parent, start, tokens, tensors, {})

    def add_whole(self, tokens: Sequence[int], tensors: Iterable[Tensor], metadata: dict[str, str]) -> bool:
        """Keeps a state that serves only as a whole; as `add`."""
        return self._write(None, 0, tokens, tensors, {**metadata, "whole": "1"})

    def set_aside(self, segment: Segment) -> None:
        """Takes what proved unreadable out of use, with what goes on from it, and keeps the file for whoever wants to know."""
        for child in list(segment.children):
            self.set_aside(child)
        self._forget(segment)
        self.torn += 1
        with contextlib.suppress(OSError):
            set_aside(segment.path)

    def shrink(self, wanted: int) -> int:
        """Removes least recently used ends of lines until `wanted` bytes are free; how many it was."""
        before = self._bytes
        while self._bytes and before - self._bytes < wanted:
            self._evict([])
        return before - self._bytes

    def lines(self) -> list[Segment]:
        """The last segment of each conversation, most recently used first."""
        return sorted(self._tree.ends(), key=lambda end: -end.used_at)

    def summary(self) -> dict[str, Any]:
        """What `status` shows; safe to be called from another thread."""
        return {
            "dir": str(self.directory),
            "entries": self._count,
            "bytes": self._bytes,
            "limit_bytes": self.limits.max_bytes,
            "torn": self.torn,
        }

    def _write(
        self,
        parent: Segment | None,
        start: int,
        tokens: Sequence[int],
        tensors: Iterable[Tensor],
        metadata: dict[str, str],
    ) -> bool:
        new = pack(tokens)
        before = parent.path.name if parent else ""
        about = {"tokens": base64.b64encode(new).decode(), "start": str(start), "parent": before}
        entry = Entry({**metadata, **about}, tensors)
        if not self._make_room(entry.size, parent, new_line=parent is None or bool(parent.children)):
            return False
        name = sha256(f"{before} {start} {'whole' in metadata}".encode() + new).hexdigest()[:24] + SUFFIX
        entry.write(self.directory / name)
        path = self.directory / name
        self._tree.add(Segment(path, parent, start, new, "whole" in metadata, time.time(), entry.size))
        self._changed(entry.size)
        return True

    def _make_room(self, size: int, parent: Segment | None, *, new_line: bool) -> bool:
        """Evicts until `size` more bytes may be written; never from the line that they go on from."""
        keep = parent.line() if parent else []
        while new_line and self._count >= self.limits.slots and self._evict(keep, with_ancestors=True):
            pass
        over = self._bytes + others_bytes(self.directory) + size - self.limits.max_bytes
        over = max(over, size + MIN_FREE_BYTES - shutil.disk_usage(self.directory).free)
        if over > 0:
            over -= shrink_others(self.directory, over)
        while over > 0:
            before = self._bytes
            if not self._evict(keep):
                return False
            over -= before - self._bytes
        return True

    def _evict(self, keep: list[Segment], with_ancestors: bool = False) -> bool:
        """Removes the least recently used segment without children, `with_ancestors` all of its line that no other needs.

        False where there is none.
        """
        candidates = [segment for segment in self._tree if not segment.children and segment not in keep]
        if not candidates:
            return False
        segment: Segment | None = min(candidates, key=lambda leaf: leaf.used_at)
        while segment is not None and not segment.children and segment not in keep:
            self._forget(segment)
            segment.path.unlink(missing_ok=True)
            segment = segment.parent if with_ancestors else None
        return True

    def _forget(self, segment: Segment) -> None:
        self._tree.remove(segment)
        self._changed(-segment.size)

    def _changed(self, size: int) -> None:
        self._bytes += size
        self._count = len(self._tree.ends())

    def _touch(self, segment: Segment) -> None:
        segment.used_at = time.time()
        with contextlib.suppress(OSError):
            os.utime(segment.path)

    def _read_all(self) -> None:
        """Rebuilds the tree from what is whole; what is torn, or goes on from what is not there, is set aside."""
        found = {path.name: parts for path in entries(self.directory) if (parts := self._read(path))}
        placed: dict[str, Segment] = {}
        waiting = dict(found)
        while ready := [name for name, (parent, _) in waiting.items() if parent == "" or parent in placed]:
            for name in ready:
                parent, segment = waiting.pop(name)
                segment.parent = placed.get(parent)
                if segment.start > (segment.parent.end if segment.parent else 0):
                    self._drop(segment.path, "it does not fit what it goes on from")
                    continue
                placed[name] = segment
                self._tree.add(segment)
        for _, segment in waiting.values():
            self._drop(segment.path, "what it goes on from is not there")

    def _read(self, path: Path) -> tuple[str, Segment] | None:
        try:
            metadata = read_about(path)
            tokens = base64.b64decode(metadata["tokens"], validate=True)
            start, parent = int(metadata["start"]), metadata["parent"]
            stat = path.stat()
            if not tokens or len(tokens) % WIDTH or start < 0:
                raise ValueError("its tokens are none")
        except FileNotFoundError:
            return None
        except (TornFileError, KeyError, ValueError, OSError) as error:
            self._drop(path, str(error))
            return None
        return parent, Segment(path, None, start, tokens, "whole" in metadata, stat.st_mtime, stat.st_size)

    def _drop(self, path: Path, why: str) -> None:
        log.warning("a KV cache entry is torn and set aside: %s: %s", path.name, why)
        self.torn += 1
        with contextlib.suppress(OSError):
            set_aside(path)


def default_max_bytes(root: Path) -> int:
    """The smaller of 40 GB and a quarter of what is free on the disk, or taken of it by the cache already."""
    taken = sum(map(folder_bytes, folders(root)))
    while not root.exists() and root != root.parent:
        root = root.parent
    return min(MAX_BYTES, (shutil.disk_usage(root).free + taken) // FREE_SHARE)


def folder_bytes(directory: Path) -> int:
    """What the entries of a folder take on the disk."""
    return sum(stat.st_size for stat in entry_stats(directory))


def entry_stats(directory: Path) -> list[os.stat_result]:
    """Of each entry that is there still: whoever has the folder may remove one at any time."""
    found = []
    for path in entries(directory):
        with contextlib.suppress(OSError):
            found.append(path.stat())
    return found


def others_bytes(directory: Path) -> int:
    """What the other folders beside this one hold."""
    return sum(folder_bytes(path) for path in folders(directory.parent) if path != directory)


def shrink_others(directory: Path, wanted: int) -> int:
    """Removes what is least recently used in folders that no process uses, oldest folder first; how many bytes it was."""
    freed = 0
    for path in sorted((path for path in folders(directory.parent) if path != directory), key=_used_at):
        if freed >= wanted:
            break
        with contextlib.suppress(OSError):
            other = Store(path, Limits(1, 1, 0))
            try:
                freed += other.shrink(wanted - freed)
            finally:
                other.close()
    return freed


def _used_at(directory: Path) -> float:
    return max((stat.st_mtime for stat in entry_stats(directory)), default=0.0)
