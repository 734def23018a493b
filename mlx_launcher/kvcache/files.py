"""Files that are written whole or not at all, in folders that one process at a time may use."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlx_launcher.models.safetensors import TornFileError, data_start, read_metadata

TEMPORARY = ".partial"
TORN = "torn"
LOCK = ".lock"
SUFFIX = ".safetensors"
# Names the model of a folder for whoever looks at it.
ABOUT = "about.json"
# The names that entries and folders have; whatever else lies in the place that the user gave is not ours to touch.
_ENTRY = re.compile(r"[0-9a-f]{24}\.safetensors")
_FOLDER = re.compile(r"[0-9a-f]{16}(-\d+)?")
_OWN = "metadata_crc32"
_CHUNK = 1 << 20


class Tensor(NamedTuple):
    """One array as it is written: `dtype` as safetensors names it, `data` its bytes in row-major order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Entry:
    """A safetensors file to be, with the CRC-32 of its data and of its metadata in its metadata. `size`: its bytes."""

    def __init__(self, metadata: dict[str, str], tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        crc, offset = 0, 0
        header: dict[str, Any] = {}
        for tensor in self._tensors:
            crc, begin = zlib.crc32(tensor.data, crc), offset
            offset += tensor.data.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, offset]}
        metadata = {**metadata, "crc32": str(crc)}
        metadata[_OWN] = _checksum(metadata)
        raw = json.dumps({"__metadata__": metadata, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        self._header = len(raw).to_bytes(8, "little") + raw
        self.size = len(self._header) + offset

    def write(self, path: Path) -> None:
        """Whole or not at all, as `write_atomically`."""

        def write(file: IO[bytes]) -> None:
            file.write(self._header)
            for tensor in self._tensors:
                file.write(tensor.data)

        write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Has `write` fill a file beside `path`, flushes it to the disk, then renames it: a kill or a power cut leaves the old file
    or the new one. Raises OSError; nothing is left then.
    """
    partial = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_about(path: Path) -> dict[str, str]:
    """The metadata of an entry. Raises TornFileError where the file is not whole, OSError where it cannot be read."""
    metadata = read_metadata(path)
    if metadata.get(_OWN) != _checksum(metadata):
        raise TornFileError(f"{path} is damaged: its header is not what was written")
    return metadata


def _checksum(metadata: dict[str, str]) -> str:
    return str(zlib.crc32(json.dumps(sorted(item for item in metadata.items() if item[0] != _OWN)).encode()))


def verify(path: Path) -> None:
    """Reads all of a file. Raises TornFileError where it is not what was written, OSError where it cannot be read."""
    wanted = read_about(path)["crc32"]
    crc = 0
    with path.open("rb") as file:
        file.seek(data_start(path))
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    if str(crc) != wanted:
        raise TornFileError(f"{path} is damaged: its data has the checksum {crc}, its header says {wanted}")


def folders(root: Path) -> list[Path]:
    """Every model's folders under a root; what else lies there is somebody else's."""
    with contextlib.suppress(OSError):
        return sorted(path for path in root.iterdir() if _is_ours(path))
    return []


def _is_ours(path: Path) -> bool:
    # Not Path.is_file, which raises for what may not be looked at: one such folder would hide the others.
    return bool(_FOLDER.fullmatch(path.name)) and not path.is_symlink() and os.path.isfile(path / LOCK)  # noqa: PTH113


def entries(directory: Path) -> Iterator[Path]:
    """The entries of a folder: not what is being written, nor what somebody else put there."""
    return (path for path in directory.glob(f"*{SUFFIX}") if _ENTRY.fullmatch(path.name))


def unfinished(directory: Path) -> Iterator[Path]:
    """What is being written in a folder, or was when its writer was killed."""
    return directory.glob(f"{TEMPORARY}-*")


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed writer left half-written."""
    for partial in unfinished(directory):
        partial.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Moves a torn file to `torn/` beside it, replacing an older one of the same name, and returns where it is now.

    Raises OSError, also where `torn` is a link.
    """
    aside = path.parent / TORN
    aside.mkdir(mode=0o700, exist_ok=True)
    if aside.is_symlink():
        raise OSError(errno.ELOOP, "a link is not followed", str(aside))
    target = aside / path.name
    path.replace(target)
    return target


def remove_folder(directory: Path) -> None:
    """Removes what is ours of a folder, and the folder if nothing else is in it. Raises BlockingIOError where a process uses it,
    and OSError.
    """
    lock = FolderLock(directory)
    try:
        remove_leftovers(directory)
        remove_torn(directory)
        for path in [*entries(directory), directory / ABOUT, directory / LOCK]:
            path.unlink(missing_ok=True)
    finally:
        lock.release()
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_torn(directory: Path) -> None:
    """Removes what was set aside."""
    if not (directory / TORN).is_symlink():
        shutil.rmtree(directory / TORN, ignore_errors=True)


class FolderLock:
    """Held while a process uses a folder, which is made where it is missing, and closed to others; ends with the process.

    Raises BlockingIOError where another one does, and OSError.
    """

    def __init__(self, directory: Path) -> None:
        while True:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if directory.is_symlink():
                raise OSError(errno.ELOOP, "a link is not followed", str(directory))
            if stat.S_IMODE(directory.stat().st_mode) & 0o077:
                directory.chmod(0o700)
            self._descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._descriptor)
                raise
            if self._is_there(directory / LOCK):
                return
            # `remove_folder` had it until now, and took it away.
            os.close(self._descriptor)

    def _is_there(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), path.lstat())
        return False

    def release(self) -> None:
        os.close(self._descriptor)
