"""From flags to a plan in a file, for the commands that bring up a supervisor."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import click

from mlx_launcher.backends.assemble import assemble, refuse_beforehand
from mlx_launcher.backends.models import Say, demo_directory
from mlx_launcher.backends.serving import Caller
from mlx_launcher.cli.configured import current_directory, document_in_force
from mlx_launcher.cli.output import App, clean
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import KEY_VARIABLES, Flags, names_a_model
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.errors import EXIT_FAILED, EXIT_USAGE, LaunchError
from mlx_launcher.plan import Plan

# -P: the directory that the user stands in may hold a json.py of its own.
PYTHON = [sys.executable, "-P", "-m"]
SUPERVISOR = [*PYTHON, "mlx_launcher.supervisor"]
# It answers in well under a second, but may first have to end what a killed supervisor left on the port.
_REPORT_S = 60.0


def make_plan(app: App, flags: Flags, say: Say) -> Plan:
    """The plan for these flags and the configuration in force, and the demo model on disk where it is asked for.

    Makes the state directory; downloads a model that is not here yet and tells `say`. LaunchError `usage` when nothing at
    all says what to serve, and what `document_in_force` and `assemble` raise.
    """
    document = document_to_serve(app, flags)
    create_state_dir(app.state_dir)
    if flags.demo:
        build_demo_model(app.state_dir)
    caller = Caller(_command(app, flags, document), current_directory(), os.environ)
    return assemble(flags, app.state_dir, caller, document, say)


def refuse_plan(app: App, flags: Flags) -> None:
    """LaunchError as `make_plan`, for as much as can be told without writing or downloading anything."""
    document = document_to_serve(app, flags)
    caller = Caller(_command(app, flags, document), current_directory(), os.environ)
    refuse_beforehand(flags, app.state_dir, caller, document)


def document_to_serve(app: App, flags: Flags) -> Document:
    """The configuration in force. LaunchError `usage` where it and the flags and the environment together name no model."""
    if flags.demo and flags.model is not None:
        hint = "Give --model for a model of yours, or --demo to try it with a tiny one"
        raise LaunchError("usage", "--model and --demo exclude each other", hint, EXIT_USAGE)
    document = document_in_force(app)
    if document.file is None and not names_a_model(flags, os.environ):
        hint = (
            "Give --model DIR or ORG/NAME, or --demo to try it with a tiny one, "
            "or write a configuration file with mlx-launch config init"
        )
        raise LaunchError("usage", "there is no model to serve", hint, EXIT_USAGE)
    return document


def _command(app: App, flags: Flags, document: Document) -> list[str]:
    """A command that prints the same plan: the same file, flags and state directory, wherever they came from now."""
    words = [*PYTHON, "mlx_launcher", "--json", f"--state-dir={app.state_dir}"]
    words += [f"--config={document.file}"] if document.file else ["--no-config"]
    return [*words, "plan", *option_words(flags)]


def option_words(flags: Flags) -> list[str]:
    """The options that say the same to any of our commands."""
    words = []
    for name, value in flags._asdict().items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value not in (None, False):
            words.append(f"{option}={value}")  # one word: the value may begin with a dash
    return words


def show_notes(app: App, plan: Plan) -> None:
    """Warnings that bar no start, for a person; a script has them in the journal."""
    if not app.json:
        for note in plan["notes"]:
            click.echo(f"mlx-launch: note: {clean(note)}", err=True)


def supervisor_environment() -> dict[str, str]:
    """This process's environment without the keys: the supervisor has them from the plan, and `ps` shows environments."""
    return {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}


def build_demo_model(state_dir: Path) -> Path:
    """The demo model, built in the state directory where it is not there yet."""
    from mlx_launcher.demo import build_demo

    directory = demo_directory(state_dir)
    try:
        build_demo(directory)
    except OSError as error:
        what = f"the demo model cannot be written to {directory}: {error.strerror or error}"
        raise LaunchError("demo_failed", what, "Make room there, or give another --state-dir") from None
    return directory


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


def spawn(
    plan: Plan,
    *switches: str,
    began: Callable[[subprocess.Popen[bytes]], object] = lambda _: None,
    stdout: int = subprocess.DEVNULL,
) -> None:
    """Starts a supervisor in a session of its own and returns when it owns the port; `began` gets its process at once.

    LaunchError: what it has against the plan, `no_report` when it says nothing.
    """
    report, theirs = os.pipe()
    try:
        with plan_file(plan) as file:
            fds = (file.fileno(), theirs)
            process = subprocess.Popen(
                [*SUPERVISOR, "--plan-fd", str(fds[0]), "--report-fd", str(fds[1]), *switches],
                pass_fds=fds,
                start_new_session=True,
                env=supervisor_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
            )
        began(process)
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(theirs)
    answer = _read_report(report)
    if not answer.get("ok"):
        error = answer["error"]
        raise LaunchError(error["code"], error["message"], error["hint"], answer.get("exit", EXIT_FAILED))


def _read_report(descriptor: int) -> dict[str, Any]:
    """The one line that a supervisor says about its own start. LaunchError when it says nothing, or nothing in time."""
    line, deadline = b"", time.monotonic() + _REPORT_S
    with os.fdopen(descriptor, "rb", buffering=0) as reader:
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            block = reader.read(65536) if left > 0 and select.select([reader], [], [], left)[0] else b""
            if not block:
                break
            line += block
    try:
        report: dict[str, Any] = json.loads(line)
    except ValueError:
        what = "the supervisor ended before it said how its start went"
        raise LaunchError("no_report", what, "mlx-launch run, with the same options, shows why") from None
    return report
