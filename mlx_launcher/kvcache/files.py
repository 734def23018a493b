"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".partial"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a file beside `path`, flushes it to the disk, then renames it: a reader or a kill sees the old file or
    the new one. The temporary name keeps the suffix, because mlx chooses a format by it. Raises OSError; nothing is left then.
    """
    partial = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    try:
        write(partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.chmod(0o600)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed writer left half-written."""
    for partial in directory.glob(f"{TEMPORARY}-*"):
        partial.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Moves a torn file to `torn/` beside it, replacing an older one of the same name, and returns where it is now."""
    aside = path.parent / "torn"
    aside.mkdir(mode=0o700, exist_ok=True)
    target = aside / path.name
    path.replace(target)
    return target
