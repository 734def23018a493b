"""A first configuration file: written whole or not at all, over nothing that was there before."""

import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from mlx_launcher.config import edit, shipped
from mlx_launcher.errors import LaunchError

SCRIPT_NAME = "mlx-textgen-server.sh"
LEGACY_SCRIPT_NAME = "mlx-server.py"
# anyclaude puts the script's path into a shell command as it is.
_SAFE_PATH = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
# The lines of our scripts that are filled in, in bash and in Python.
_PYTHON = re.compile(r'^(python=|PYTHON = )""', re.MULTILINE)
_STATE_DIR = re.compile(r'^(state_dir=|STATE_DIR = )""', re.MULTILINE)
_STARTUP_TIMEOUT_MS = 120_000


def refuse_existing(target: Path, force: bool) -> None:
    """LaunchError `file_exists` when something would be overwritten without `force`."""
    if os.path.isdir(target):  # noqa: PTH112 - Path.is_dir raises for what it may not look at
        raise LaunchError("file_exists", f"{target} is a directory", "Name a file")
    if os.path.lexists(target) and not force:
        what = f"{target} is there already, and nothing was written"
        raise LaunchError("file_exists", what, "Name another file, or replace it with --force: a copy is kept")


def script_path(state_dir: Path, name: str = SCRIPT_NAME) -> Path:
    """Where a script of ours is installed: in the state directory, or else beside this installation.

    LaunchError `no_safe_path` when both have spaces or the like, which anyclaude's shell command cannot hold.
    """
    places = [state_dir / "bin", Path(sys.prefix) / "share" / "mlx-launch"]
    safe = [place for place in places if _SAFE_PATH.fullmatch(os.fspath(place))]
    if not safe:
        what = f"anyclaude needs a path without spaces for its server script, and neither {places[0]} nor {places[1]} is one"
        raise LaunchError("no_safe_path", what, "Give another state directory with --state-dir")
    return safe[0] / name


def script_text(state_dir: Path, state_dir_given: bool, name: str = SCRIPT_NAME) -> str:
    """A script of ours as it is installed: this interpreter, and a state directory that was given, are written into it."""
    text = shipped.read_text("scripts", name)
    quoted = shlex.quote if name.endswith(".sh") else repr
    text = _PYTHON.sub(lambda found: f"{found[1]}{quoted(sys.executable)}", text, count=1)
    if state_dir_given:
        text = _STATE_DIR.sub(lambda found: f"{found[1]}{quoted(os.fspath(state_dir))}", text, count=1)
    return text


def install_script(state_dir: Path, state_dir_given: bool, name: str = SCRIPT_NAME) -> Path:
    """A script of ours at its path, replaced where it is there. LaunchError `no_safe_path`, or `not_written`."""
    text = script_text(state_dir, state_dir_given, name)
    script = script_path(state_dir, name)
    try:
        script.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(script, text, 0o700)
    except OSError as error:
        what = f"the server script cannot be written to {script}: {error.strerror or error}"
        raise LaunchError("not_written", what, "Make room there, or give another --state-dir") from None
    return script


def content(model_path: str, port: int, script: Path) -> str:
    """The file: what anyclaude at its mode `mlx` and mlx-launch both need, and nothing else."""
    block = {
        "enabled": True,
        "port": port,
        "baseUrl": f"http://localhost:{port}/v1",
        "apiKey": "mlx",
        "model": os.path.basename(model_path),  # noqa: PTH119
        "modelPath": model_path,
        "serverScript": os.fspath(script),
        "startupTimeout": _STARTUP_TIMEOUT_MS,
        "description": "mlx-textgen, started and watched by mlx-launch",
    }
    whole = {
        "// written by": "mlx-launch config init; all keys: mlx-launch config schema",
        "backend": "mlx",
        "pythonVenv": sys.prefix,
        "backends": {"mlx": block},
    }
    return json.dumps(whole, indent=2) + "\n"


def write(target: Path, text: str, force: bool) -> Path | None:
    """Puts the text at `target`, atomically; returns where what was there before is kept. LaunchError `not_written`."""
    refuse_existing(target, force)
    real = Path(os.path.realpath(target))  # a link stays one
    backup = None
    try:
        if real.exists():
            backup = edit.keep(real, real.read_bytes())
        _replace(real, text, 0o600)
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror or error}"
        raise LaunchError("not_written", what, "Name another file") from None
    return backup


def what_anyclaude_misses(target: Path, model_path: str) -> list[str]:
    """What keeps anyclaude from starting the server with this file, though mlx-launch can."""
    notes = []
    if target.name != ".anyclauderc.json":
        notes.append("anyclaude reads only .anyclauderc.json in the directory that it is started in")
    if not Path(sys.prefix, "bin", "activate").is_file():
        what = f"anyclaude wants {sys.prefix}/bin/activate, which is not there"
        notes.append(f"{what}: install mlx-launcher in a virtual environment (python3 -m venv)")
    if any(sign in model_path for sign in '"$`\\'):
        notes.append(f"anyclaude cannot pass on the model's path {model_path}: rename it without quotes, $, ` and \\")
    return notes


def _replace(file: Path, text: str, mode: int) -> None:
    descriptor, fresh = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(fresh, file)  # noqa: PTH105
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise
