"""From flags to a plan in a file, for the two commands that bring up a supervisor."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

from mlx_launcher.backends.assemble import API_KEY_VARIABLE, Caller, Flags, assemble, demo_directory
from mlx_launcher.cli.output import App
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.plan import Plan

# -P: the directory that the user stands in may hold a json.py of its own.
SUPERVISOR = [sys.executable, "-P", "-m", "mlx_launcher.supervisor"]


def make_plan(app: App, flags: Flags, demo: bool) -> Plan:
    """The plan for these flags, and the demo model on disk where it is asked for. Makes the state directory.

    LaunchError `usage` unless exactly one of --model and --demo is given, and what `assemble` raises.
    """
    if (flags.model is None) != demo:
        hint = "Give --model DIR for a model on disk, or --demo to try it with a tiny one"
        what = "--model and --demo exclude each other" if demo else "there is no model to serve"
        raise LaunchError("usage", what, hint, EXIT_USAGE)
    create_state_dir(app.state_dir)
    if demo:
        _build_demo(demo_directory(app.state_dir))
    caller = Caller([sys.executable, "-m", "mlx_launcher", *app.arguments], _current_directory(), os.environ)
    return assemble(flags, app.state_dir, caller)


def supervisor_environment() -> dict[str, str]:
    """This process's environment without the key: the supervisor has it from the plan, and `ps` shows environments."""
    return {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}


def _build_demo(directory: Path) -> None:
    from mlx_launcher.demo import build_demo

    try:
        build_demo(directory)
    except OSError as error:
        what = f"the demo model cannot be written to {directory}: {error.strerror or error}"
        raise LaunchError("demo_failed", what, "Make room there, or give another --state-dir") from None


def _current_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        raise LaunchError("no_directory", "the current directory is gone", "Change to another one first") from None


def plan_file(plan: Plan) -> IO[bytes]:
    """The plan in a file without a name, readable by whoever gets its descriptor: it holds keys and may be long."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(json.dumps(plan).encode())
        file.seek(0)  # flushes too; whoever inherits the descriptor inherits the position
    except OSError as error:
        what = f"no temporary file can be written in {tempfile.gettempdir()}: {error.strerror or error}"
        raise LaunchError("temporary_file", what, "Make room there, or name another place in TMPDIR") from None
    return file
