"""One value of a user's JSON file, changed in place: every other byte stays, and the file is the old or the new one."""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.errors import LaunchError

_BY_HAND = "Change it by hand"
_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_BACKUPS = 100


class Source(NamedTuple):
    """A file as it was read. `real` is where its links lead to; it is overwritten only while it is what was read."""

    file: Path
    real: Path
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()


def read(file: Path) -> Source:
    """LaunchError `not_read` for a file that cannot be read or is not UTF-8."""
    real = Path(os.path.realpath(file))
    try:
        source = Source(file, real, real.read_bytes())
        source.data.decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LaunchError("not_read", f"{file} cannot be read: {reason}", "Make it a readable UTF-8 file") from None
    return source


# -- the text


class _Member(NamedTuple):
    key: str
    start: int  # of the key
    colon: str  # what stands between key and value
    value: int
    end: int


def raw_value(text: str, path: Sequence[str]) -> str | None:
    """The value at `path` as it is written there; None where its object lacks the key. LaunchError `not_located`."""
    found = _locate(text, path)[1]
    return None if found is None else text[found.value : found.end]


def set_value(text: str, path: Sequence[str], raw: str) -> str:
    """The text with `raw`, a JSON value, at `path`; a key that is absent is added last, indented as its neighbours are.

    LaunchError `not_located` when the object is not there, or a key on the way to it is there twice.
    """
    members, found, opening, closing = _locate(text, path)
    if found is not None:
        new = text[: found.value] + raw + text[found.end :]
    elif members:
        new = text[: members[-1].end] + _another(text, opening, members, _key(path), raw) + text[members[-1].end :]
    else:
        new = text[: opening + 1] + _alone(text, opening, f"{_key(path)}: {raw}") + text[closing:]
    _verify(text, new, path, raw)
    return new


def remove_value(text: str, path: Sequence[str]) -> str:
    """The text without the key at `path`, and without the comma that it needed. LaunchError `not_located`."""
    members, found, opening, closing = _locate(text, path)
    if found is None:
        raise _not_located(path, "it is not there")
    at = members.index(found)
    if at:
        start, end = members[at - 1].end, found.end
    elif len(members) > 1:
        start, end = found.start, members[1].start
    else:
        start, end = opening + 1, closing
    new = text[:start] + text[end:]
    _verify(text, new, path, None)
    return new


def _locate(text: str, path: Sequence[str]) -> tuple[list[_Member], _Member | None, int, int]:
    """The members of the object that holds the last key of `path`, that key's own, and where the braces stand."""
    try:
        json.loads(text)  # what follows relies on it
        start = _skip(text, 0)
        for depth, key in enumerate(path):
            if text[start] != "{":
                raise _not_located(path, f"{'.'.join(path[:depth]) or 'the file'} is no object")
            members = list(_members(text, start))
            named = [member for member in members if member.key == key]
            if len(named) > 1:
                raise _not_located(path, f"{'.'.join(path[: depth + 1])} is there {len(named)} times")
            if depth == len(path) - 1:
                closing = _skip(text, members[-1].end if members else start + 1)
                return members, named[0] if named else None, start, closing
            if not named:
                raise _not_located(path, f"there is no {'.'.join(path[: depth + 1])}")
            start = named[0].value
    except (ValueError, RecursionError) as error:
        raise _not_located(path, f"this is not JSON: {error}") from None
    raise ValueError("an empty path")


def _members(text: str, opening: int) -> Iterator[_Member]:
    decoder = json.JSONDecoder()
    at = _skip(text, opening + 1)
    while text[at] != "}":
        key, key_end = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, key_end) + 1)
        end = decoder.raw_decode(text, value)[1]
        yield _Member(key, at, text[key_end:value], value, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # noqa: S101 - it matches the empty text
    return found.end()


def _key(path: Sequence[str]) -> str:
    return json.dumps(path[-1], ensure_ascii=False)


def _another(text: str, opening: int, members: Sequence[_Member], key: str, raw: str) -> str:
    """One more member, with the white space of the last one."""
    last = members[-1]
    before = members[-2].end if len(members) > 1 else opening + 1
    gap = text[before : last.start].rpartition(",")[2]
    if not gap and len(members) == 1 and last.colon.endswith(" "):  # {"a": 1}, where no comma shows what follows one
        gap = " "
    return f",{gap}{key}{last.colon}{raw}"


def _alone(text: str, opening: int, member: str) -> str:
    """The only member of an object, in a file's own indentation."""
    newline = re.search(r"\r?\n", text.strip())
    if newline is None:
        return member
    line = text.rfind("\n", 0, opening) + 1
    outer = re.match(r"[ \t]*", text[line:])
    inner = re.search(r"\n([ \t]+)", text)
    indent = outer[0] if outer else ""
    return f"{newline[0]}{indent}{inner[1] if inner else '  '}{member}{newline[0]}{indent}"


def _verify(old: str, new: str, path: Sequence[str], raw: str | None) -> None:
    """That only the value that is meant differs, whatever the text looked like."""
    expected: Any = json.loads(old, object_pairs_hook=list)
    inner = expected
    for key in path[:-1]:
        inner = next(value for name, value in inner if name == key)
    at = next((number for number, (name, _) in enumerate(inner) if name == path[-1]), len(inner))
    inner[at : at + 1] = [] if raw is None else [(path[-1], json.loads(raw, object_pairs_hook=list))]
    # Compared as text: NaN is not equal to itself.
    if repr(json.loads(new, object_pairs_hook=list)) != repr(expected):
        raise _not_located(path, "its place cannot be told")


def _not_located(path: Sequence[str], why: str) -> LaunchError:
    return LaunchError("not_located", f"{'.'.join(path)} cannot be changed: {why}", _BY_HAND)


# -- the file


def write(source: Source, text: str) -> Path:
    """Puts `text` in the place of what was read, atomically, with owner and mode kept; returns the dated backup beside it.

    LaunchError `changed_meanwhile` when the file is not what was read, `not_written` when there is no room or no right to.
    """
    real = source.real
    fresh = real.with_name(f".{real.name.lstrip('.')}.mlx-launch.new")
    backup: Path | None = None
    try:
        with _locked(fresh) as descriptor:
            try:
                _refuse_changed(source)
                backup = keep(source.real, source.data)
                _fill(descriptor, text.encode(), real.stat())
                _refuse_changed(source)  # again, as close to the exchange as it gets
                os.replace(fresh, real)  # noqa: PTH105
            except BaseException:
                fresh.unlink(missing_ok=True)
                if backup is not None:
                    backup.unlink(missing_ok=True)
                raise
        _sync_directory(real.parent)
    except OSError as error:
        what = f"{source.file} cannot be written: {error.strerror or error}"
        raise LaunchError("not_written", what, "Nothing was changed; make it writable, or change it by hand") from None
    return backup


def backups(file: Path) -> list[Path]:
    """The backups that `keep` made of a file, the youngest first."""
    real = Path(os.path.realpath(file))
    pattern = re.compile(re.escape(real.name) + r"\.(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ)(?:-(\d+))?\.bak")
    try:
        found = [
            (match[1], int(match[2] or 0), path)
            for path in real.parent.iterdir()
            if (match := pattern.fullmatch(path.name))
        ]
    except OSError:
        return []
    return [path for _, _, path in sorted(found, reverse=True)]


@contextlib.contextmanager
def _locked(fresh: Path) -> Iterator[int]:
    """The new file under its name, ours alone. One that a killed command left is taken over: the kernel let go of its lock."""
    while True:
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"another command is changing {fresh.parent} at this moment"
                raise LaunchError("changed_meanwhile", what, "Try again when it is done") from None
            # Whoever had the lock before may have put this very file in its place.
            if fresh.exists() and os.path.samestat(os.fstat(descriptor), fresh.lstat()):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _refuse_changed(source: Source) -> None:
    try:
        same = Path(os.path.realpath(source.file)) == source.real and source.real.read_bytes() == source.data
    except FileNotFoundError:
        same = False
    if not same:
        what = f"{source.file} was changed by someone else meanwhile, and is not overwritten"
        raise LaunchError("changed_meanwhile", what, "Look at it, then try again")


def _fill(descriptor: int, data: bytes, owner: os.stat_result) -> None:
    os.fchmod(descriptor, 0o600)
    os.ftruncate(descriptor, 0)
    while data:
        data = data[os.write(descriptor, data) :]
    if (owner.st_uid, owner.st_gid) != (os.fstat(descriptor).st_uid, os.fstat(descriptor).st_gid):
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    os.fchmod(descriptor, owner.st_mode & 0o7777)
    os.fsync(descriptor)


def keep(file: Path, data: bytes) -> Path:
    """A dated copy beside the file that its owner alone may read: it may hold a key. OSError where there can be none."""
    stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    for number in range(_MAX_BACKUPS):
        copy = file.with_name(f"{file.name}.{stamp}{f'-{number}' if number else ''}.bak")
        try:
            descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        return copy
    raise FileExistsError(f"there are {_MAX_BACKUPS} backups of this second")


def _sync_directory(directory: Path) -> None:
    # What cannot be synced is written all the same: no reason to say that it is not.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
