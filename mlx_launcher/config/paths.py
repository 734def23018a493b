"""Where state lives: one directory, and in it one directory per port."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from mlx_launcher.errors import LaunchError

STATE_DIR_VARIABLE = "MLX_LAUNCH_STATE_DIR"
# What this program keeps in a state directory beside a directory for each port and the KV cache.
_OURS = ("bin", "models", ".DS_Store")
_OTHERS = 0o077
_ELSEWHERE = f"Give another one with --state-dir or {STATE_DIR_VARIABLE}"


def default_state_dir() -> Path:
    """`~/.anyclaude/mlx-launch`. LaunchError `state_dir` when there is no home directory."""
    try:
        return Path.home() / ".anyclaude" / "mlx-launch"
    except RuntimeError:
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
    """Makes the directory, 0700, where it does not exist yet, and closes one of ours that is open to others.

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
    names = sorted(os.listdir(directory))  # noqa: PTH208
    for path in [directory / name for name in names]:
        if _is_directory_of_ours(path.name) and path.is_symlink():
            hint = f"Remove it. {_ELSEWHERE}, or another cache.dir"
            raise LaunchError("state_dir", f"{path} is a link, which is not followed", hint)
    if found.st_mode & _OTHERS:
        if found.st_mode & stat.S_ISVTX or not all(map(_is_of_ours, names)):
            what = f"others can look into the state directory {directory}, and it holds more than our state"
            raise LaunchError("state_dir", what, f"{_ELSEWHERE}, or chmod 700 {directory}")
        directory.chmod(0o700)


def _is_directory_of_ours(name: str) -> bool:
    return name.isdecimal() or name == "kvcache"


def _is_of_ours(name: str) -> bool:
    return _is_directory_of_ours(name) or name in _OURS or name.startswith("bench-")
