"""The API key from a file of its own."""

import os
import shlex
import stat
from pathlib import Path

from mlx_launcher.errors import EXIT_CONFIG, LaunchError

_MAX_BYTES = 4096
_OTHERS = 0o077


def read_key(file: Path) -> str:
    """The one line of a file that is ours and that nobody else can read. LaunchError `key_file` (exit 4) for any other."""
    try:
        # O_NONBLOCK: a FIFO must not keep a command waiting.
        opened = open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "this is no path"
        raise _refused(
            file, f"cannot be read: {reason}", "Write the key to it with umask 077, or change apiKeyFile"
        ) from None
    with opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise _refused(file, "is no file", "Name a file that holds the key and nothing else")
        if found.st_uid != os.geteuid():
            raise _refused(file, "belongs to another user", f'sudo chown "$(id -un)" {shlex.quote(os.fspath(file))}')
        if found.st_mode & _OTHERS:
            mode = stat.S_IMODE(found.st_mode)
            raise _refused(
                file, f"can be read by others (mode {mode:04o})", f"chmod 600 {shlex.quote(os.fspath(file))}"
            )
        try:
            key = opened.read(_MAX_BYTES + 1).decode("ascii").strip()
        except UnicodeDecodeError:
            key = ""
    if not key or len(key) > _MAX_BYTES or not key.isprintable() or " " in key:
        # What is in it is not shown.
        raise _refused(file, "holds no key", "A key is one word of ASCII signs, alone in the file")
    return key


def _refused(file: Path, what: str, hint: str) -> LaunchError:
    return LaunchError("key_file", f"the file of the API key, {file}, {what}", hint, EXIT_CONFIG)
