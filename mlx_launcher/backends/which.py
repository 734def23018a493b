"""Which kind of server a block means: one of the built-in ones, a script of the user's, or a command."""

import itertools
import os
from pathlib import Path
from typing import Literal, NamedTuple

from mlx_launcher.config import modes
from mlx_launcher.config.layers import Settings
from mlx_launcher.config.problems import error, invalid

# Our own scripts, which anyclaude calls, mean the built-in backends here; anyclaude has files of the same names.
MARKERS = {"# mlx-launch built-in: textgen": "textgen", "# mlx-launch built-in: legacy": "legacy"}
NAMES = {"mlx-textgen-server.sh": "textgen", "mlx-server.py": "legacy"}
# Served by our own host, which loads MLX models only.
BUILT_IN = ("textgen", "legacy", "cluster")
_MARKER_LINES = 20
_LINE_BYTES = 1000


class Kind(NamedTuple):
    """`script` is the file of a "script", and None otherwise."""

    name: Literal["textgen", "legacy", "cluster", "script", "command"]
    script: Path | None = None


def which(settings: Settings, cwd: str) -> Kind:
    """What the block of these settings is served by: `command`, else `serverScript`, else what its name says.

    LaunchError `config_invalid` for a script that is not there or cannot be read.
    """
    if settings["command"] is not None:
        return Kind("command")
    if settings["serverScript"]:
        kind = _of_script(settings, cwd)
    else:
        kind = Kind("legacy" if settings.block in modes.LEGACY else "textgen")
    several = settings.block == modes.CLUSTER or settings["distributed.enabled"]
    return Kind("cluster") if several and kind.name == "textgen" else kind


def _of_script(settings: Settings, cwd: str) -> Kind:
    written: str = settings["serverScript"]
    script = Path(os.path.normpath(settings.base("serverScript", cwd) / os.path.expanduser(written)))  # noqa: PTH111
    built_in = NAMES.get(script.name)
    path = ("backends", settings.block, "serverScript")
    try:
        marked = _marker(script)
    except FileNotFoundError:
        if built_in is None:
            hint = "Correct the path, or remove the key to serve with mlx-textgen"
            raise invalid(settings.document.name, error(path, f"there is no script {script}", hint)) from None
        marked = built_in
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        problem = error(path, f"{script} cannot be read: {reason}", "Make it readable, or name another script")
        raise invalid(settings.document.name, problem) from None
    if marked is None:
        return Kind("script", script)
    return Kind("legacy" if marked == "legacy" else "textgen")


def _marker(script: Path) -> str | None:
    """Which built-in backend the script's marker line names, if it has one."""
    with script.open("rb") as file:
        lines = (file.readline(_LINE_BYTES) for _ in itertools.repeat(None, _MARKER_LINES))
        found = (MARKERS.get(line.decode("utf-8", "replace").strip()) for line in lines)
        return next((name for name in found if name), None)
