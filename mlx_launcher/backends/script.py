"""A user's own server script, called as anyclaude calls it."""

import os
from pathlib import Path

from mlx_launcher.backends.serving import Serving
from mlx_launcher.config.layers import Settings
from mlx_launcher.errors import EXIT_CONFIG, LaunchError
from mlx_launcher.plan import Backend

# Positional parameters, so that no path is ever read by a shell as anything but a path.
_IN_VENV = 'source "$1/bin/activate" && exec python3 "$2" --model "$3" --port "$4"'


def script(serving: Serving, settings: Settings, file: Path, cwd: str) -> Backend:
    """`bash SCRIPT MODEL PORT LOG` for a `.sh`, else `python3 SCRIPT --model MODEL --port PORT` inside `pythonVenv`.

    LaunchError `no_venv` when there is no virtual environment at `pythonVenv`.
    """
    port, model = str(serving.port), serving.model["path"]
    if file.suffix == ".sh":
        argv = ["bash", os.fspath(file), model, port, os.fspath(serving.instance / "script.log")]
    else:
        argv = ["bash", "-c", _IN_VENV, "mlx-launch", _venv(settings, cwd), os.fspath(file), model, port]
    return {
        "name": settings.block,
        "kind": "script",
        "argv": argv,
        "env": {"PYTHONUNBUFFERED": "1", **settings["env"]},
        "cwd": os.fspath(settings.base("serverScript", cwd)),
        "settings": serving.probe(),
    }


def _venv(settings: Settings, cwd: str) -> str:
    written: str = os.path.expanduser(settings["pythonVenv"])  # noqa: PTH111
    venv = os.path.normpath(os.fspath(settings.base("pythonVenv", cwd) / written))
    if not Path(venv, "bin", "activate").is_file():
        what = f"{settings['serverScript']} runs in the virtual environment {venv}, and there is no bin/activate in it"
        hint = "Set pythonVenv at the top of the file, or make one with python3 -m venv"
        raise LaunchError("no_venv", what, hint, EXIT_CONFIG)
    return venv
