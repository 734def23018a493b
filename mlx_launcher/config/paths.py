"""Where state lives: one directory, and in it one directory per port."""

import os
from collections.abc import Mapping
from pathlib import Path

from mlx_launcher.errors import LaunchError

STATE_DIR_VARIABLE = "MLX_LAUNCH_STATE_DIR"
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
    """Makes the directory, 0700, where it does not exist yet. LaunchError `state_dir` when nothing can be kept there.

    One that exists keeps its mode: it may be a directory that the user shares on purpose.
    """
    try:
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(
            "state_dir", f"the state directory {directory} cannot be made: {reason}", _ELSEWHERE
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LaunchError("state_dir", f"the state directory {directory} cannot be written to", _ELSEWHERE)
