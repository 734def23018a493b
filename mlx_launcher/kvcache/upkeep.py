"""The KV cache of all models as its owner sees it: what there is, whether it is whole, and how to get rid of it.

A folder that a server uses is only looked at.
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.kvcache.files import ABOUT, LOCK, TORN, entries, folders, remove_folder, remove_torn, verify
from mlx_launcher.kvcache.store import Limits, Store, entry_stats, folder_bytes
from mlx_launcher.models.safetensors import TornFileError


class Folder(NamedTuple):
    """One model's. `model`: what it called itself when it was served last. `torn_bytes`: of what was set aside."""

    path: Path
    model: str | None
    model_path: str | None
    files: int
    bytes_: int
    torn_bytes: int
    used_at: float | None  # seconds since the epoch
    in_use: bool


class Cleaned(NamedTuple):
    """What was removed, in bytes, and which folders were left alone because a server uses them."""

    bytes_: int
    in_use: list[Path]


def survey(root: Path) -> list[Folder]:
    """Every folder under a root, the most recently used first."""
    found = [_look(path) for path in folders(root)]
    return sorted(found, key=lambda folder: -(folder.used_at or 0.0))


def damaged(directory: Path) -> list[tuple[Path, str]]:
    """Reads all of a folder's entries, and names those that are not what was written, with the reason."""
    found = []
    for path in sorted(entries(directory)):
        try:
            verify(path)
        except FileNotFoundError:  # evicted meanwhile
            continue
        except (TornFileError, OSError) as error:
            found.append((path, str(error)))
    return found


def prune(root: Path, max_bytes: int) -> Cleaned:
    """Removes what serves nobody: what was set aside as torn, the entries of models that are gone, and, from the least recently
    used folder on, what is beyond `max_bytes`. Raises OSError.
    """
    before, found = _bytes(root), survey(root)
    in_use = _each(found, _remove_what_is_useless)

    def shrink(folder: Folder) -> None:
        over = sum(map(folder_bytes, folders(root))) - max_bytes
        if over > 0 and folder.path.exists():
            _shrink(folder.path, over)

    _each([folder for folder in reversed(found) if folder.path not in in_use], shrink)
    return Cleaned(before - _bytes(root), in_use)


def clear(root: Path) -> Cleaned:
    """Removes everything that no server uses. Raises OSError."""
    before = _bytes(root)
    in_use = _each(survey(root), lambda folder: remove_folder(folder.path))
    return Cleaned(before - _bytes(root), in_use)


def _each(found: Iterable[Folder], work: Callable[[Folder], None]) -> list[Path]:
    """Does it to each, and returns those that a server has."""
    in_use = []
    for folder in found:
        try:
            work(folder)
        except BlockingIOError:
            in_use.append(folder.path)
    return in_use


def _remove_what_is_useless(folder: Folder) -> None:
    if folder.model_path is not None and not Path(folder.model_path).exists():
        remove_folder(folder.path)
    else:
        _shrink(folder.path, 0)


def _shrink(directory: Path, wanted: int) -> None:
    # Opening it sets aside what is torn and removes what a killed writer left.
    store = Store(directory, Limits(1, 1, 0))
    try:
        store.shrink(wanted)
        remove_torn(directory)
    finally:
        store.close()


def _look(directory: Path) -> Folder:
    stats = entry_stats(directory)
    about = {}
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((directory / ABOUT).read_bytes())
    named = about if isinstance(about, dict) else {}
    return Folder(
        directory,
        named.get("model"),
        named.get("path"),
        len(stats),
        sum(stat.st_size for stat in stats),
        _tree_bytes(directory / TORN),
        max((stat.st_mtime for stat in stats), default=None),
        _in_use(directory),
    )


def _in_use(directory: Path) -> bool:
    try:
        with (directory / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _bytes(root: Path) -> int:
    return sum(map(_tree_bytes, folders(root)))


def _tree_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total
