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


def writable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def owner(path: Path) -> str:
    """The name of whoever owns a file, a number where the system has no name for it."""
    uid = path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def is_ours(path: Path) -> bool:
    return path.stat().st_uid == os.geteuid()


def make_writable(path: Path) -> str:
    """The command that lets us write to a directory: its mode is ours to change only where it is ours."""
    quoted = shlex.quote(str(path))
    return f"chmod u+rwx {quoted}" if is_ours(path) else f'sudo chown -R "$(id -un)" {quoted}'
