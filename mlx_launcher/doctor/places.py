"""Whether and why not a directory can be written to, whether it is there yet or not."""

import os
import pwd
import shlex
from pathlib import Path


def nearest(path: Path) -> Path:
    """The path itself, or the first above it that exists: that decides whether it can be made."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def is_directory(path: Path) -> bool:
    """False also where that cannot be told; Path.is_dir raises then."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """The same for Path.is_file."""
    return os.path.isfile(path)  # noqa: PTH113


def writable(path: Path) -> bool:
    return is_directory(path) and os.access(path, os.W_OK | os.X_OK)


def owner(path: Path) -> str:
    """The name of whoever owns a file, a number where the system has no name for it."""
    uid = path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def is_ours(path: Path) -> bool:
    return path.stat().st_uid == os.geteuid()


def make_writable(path: Path, home: Path) -> str | None:
    """The command that lets us write to a directory, whether it is there yet or not.

    None where it is another's: what is not in `home`, ours, may be the system's, and sudo only makes something new there.
    """
    above = nearest(path)
    if is_ours(above):
        return f"chmod u+rwx {shlex.quote(str(above))}"
    if home in above.parents and is_ours(home):
        return f'sudo chown -R "$(id -un)" {shlex.quote(str(above))}'
    return f'sudo install -d -m 700 -o "$(id -un)" {shlex.quote(str(path))}' if above != path else None


def set_aside(path: Path) -> str:
    """The command that makes room for a directory where something else is."""
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.aside')}"
