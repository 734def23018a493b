"""A directory of built files: whole or absent, never half, however many builders there are and whenever one is killed."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_MANIFEST = "recipe.json"


def install(directory: Path, recipe: str, make: Callable[[], Mapping[str, bytes]]) -> Path:
    """Makes `directory` hold the files that `make` returns for `recipe`, and returns it.

    One that is whole and of this recipe is kept. Anything else of ours there, torn or older, is replaced in one rename.
    Builders of the same directory wait for each other. The directory is 0700, files are 0600.

    Raises FileExistsError if there is something at `directory` that `install` did not make, OSError as the file system does.
    """
    directory = Path(directory)
    if _is_whole(directory, recipe):
        return directory
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        if not _is_whole(directory, recipe):  # another builder may have been quicker
            _replace(directory, recipe, make())
    return directory


def _replace(directory: Path, recipe: str, files: Mapping[str, bytes]) -> None:
    _refuse_strangers(directory, {*files, _MANIFEST})
    fresh, old = (directory.with_name(f".{directory.name}.{what}") for what in ("new", "old"))
    for leftover in (fresh, old):  # of a killed builder: we hold the lock, so nobody is at work on them
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    manifest = {"recipe": recipe, "sha256": {name: _digest(data) for name, data in files.items()}}
    for name, data in {**files, _MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
        _write_private(fresh / name, data)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _is_whole(directory: Path, recipe: str) -> bool:
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        digests = manifest["sha256"].items()
        return manifest["recipe"] == recipe and all(
            _digest((directory / name).read_bytes()) == digest for name, digest in digests
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _refuse_strangers(directory: Path, ours: set[str]) -> None:
    """A wrong path must not cost somebody their files: only what we could have made is replaced."""
    if not directory.exists():
        return
    strangers = sorted({entry.name for entry in directory.iterdir()} - ours)
    if strangers:
        raise FileExistsError(f"{directory} holds {strangers[0]}, which is not part of a built model; it is left alone")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_private(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
