"""Where state lives: one directory, and in it one directory per port."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from mlx_launcher.errors import LaunchError

STATE_DIR_VARIABLE = "MLX_LAUNCH_STATE_DIR"
# What this program keeps in a state directory beside a directory for each port and the KV cache.
_OURS = ("bin", "models", ".DS_Store")
_OURS_BEGIN = ("bench-", "transformers.json", "mlx-launch-error-", "service-")
_KEPT = ("kvcache", "bin", "models")
_OTHERS = 0o077
_ELSEWHERE = f"Give another one with --state-dir or {STATE_DIR_VARIABLE}"


def default_state_dir() -> Path:
    """`~/.anyclaude/mlx-launch`. LaunchError `state_dir` when there is no home directory."""
    try:
        return Path.home().absolute() / ".anyclaude" / "mlx-launch"
    except (RuntimeError, OSError):
        raise LaunchError("state_dir", "there is no home directory to keep the state in", _ELSEWHERE) from None


def state_dir(given: str | None, environment: Mapping[str, str]) -> Path:
    """The state directory, absolute: the flag, else the environment, else the default. Touches nothing on disk."""
    chosen = given or environment.get(STATE_DIR_VARIABLE)
    if not chosen:
        return default_state_dir()
    try:
        return Path(chosen).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise LaunchError("state_dir", f"the state directory {chosen} cannot be found: {error}", _ELSEWHERE) from None


def create_state_dir(directory: Path) -> None:
    """Makes the directory, 0700, where it does not exist yet, and closes what is ours, in it too, and open to others.

    LaunchError `state_dir` when nothing can be kept there; when it is another user's; when others may look into it and what
    lies in it is not all ours, so that closing it may be wrong; when a link stands in place of a directory in it.
    """
    try:
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
        _keep_to_ourselves(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(
            "state_dir", f"the state directory {directory} cannot be made: {reason}", _ELSEWHERE
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LaunchError("state_dir", f"the state directory {directory} cannot be written to", _ELSEWHERE)


def _keep_to_ourselves(directory: Path) -> None:
    found = directory.stat()
    if found.st_uid != os.geteuid():
        raise LaunchError("state_dir", f"the state directory {directory} belongs to another user", _ELSEWHERE)
    for path in sorted(directory.iterdir()):
        if _is_directory_of_ours(path.name) and path.is_symlink():
            hint = f"Remove it. {_ELSEWHERE}, or another cache.dir"
            raise LaunchError("state_dir", f"{path} is a link, which is not followed", hint)
    if found.st_mode & _OTHERS:
        if not may_be_closed(directory):
            what = f"others can look into the state directory {directory}, and it holds more than our state"
            raise LaunchError("state_dir", what, f"{_ELSEWHERE}, or chmod 700 {directory}")
        directory.chmod(0o700)
    for path in loose(directory):
        path.chmod(path.stat().st_mode & 0o700)


def loose(directory: Path) -> list[Path]:
    """What is ours in a state directory and open to others, but for the instances' directories, which supervisors close."""
    folders = [path for name in _KEPT if (path := directory / name).is_dir() and not path.is_symlink()]
    scripts = [path for path in sorted((directory / "bin").glob("*")) if path.is_file() and not path.is_symlink()]
    found = [(path, path.stat()) for path in (*folders, *scripts)]
    return [path for path, seen in found if seen.st_uid == os.geteuid() and seen.st_mode & _OTHERS]


def may_be_closed(directory: Path) -> bool:
    """Whether others have no business in it: what lies there is our state and nothing else."""
    return not directory.stat().st_mode & stat.S_ISVTX and all(map(_is_of_ours, os.listdir(directory)))  # noqa: PTH208


def _is_directory_of_ours(name: str) -> bool:
    return name.isdecimal() or name == "kvcache"


def _is_of_ours(name: str) -> bool:
    return _is_directory_of_ours(name) or name in _OURS or name.startswith(_OURS_BEGIN)
