"""`mlx-launch doctor`: what is wrong with this installation, and the command that mends it."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli import instances
from mlx_launcher.cli.configured import current_directory, document_in_force, file_in_force
from mlx_launcher.cli.options import json_option, server_options
from mlx_launcher.cli.output import App, Result, clean, may_paint
from mlx_launcher.cli.screen import WIDTH, wrapped
from mlx_launcher.config import defaults
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import Flags
from mlx_launcher.doctor.check import Check, Instance, Subject
from mlx_launcher.doctor.examination import examine
from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor import control

_ANSWER_S = 1.0  # for a supervisor's answer, which takes milliseconds
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
_RESULT, _NAME = 9, 17


@click.command("doctor")
@server_options
@json_option
@click.pass_obj
def command(app: App, /, **server: Any) -> Result:
    """Check the installation, and show the remedy of whatever is wrong.

    It takes the options of `start` and checks what they would make of it. Nothing is started, loaded or changed. Exits with 1
    when a check failed; warnings alone are no failure.
    """
    checks = examine(_subject(app, Flags(**server)))
    failed = [check for check in checks if check.result == "failed"]
    error = None
    if failed:
        names = ", ".join(dict.fromkeys(check.name for check in failed))
        count = f"{len(failed)} of {len(checks)} findings {'is a failure' if len(failed) == 1 else 'are failures'}"
        error = LaunchError("checks_failed", f"{count}: {names}", "Each has its remedy beside it")
    return Result({"checks": [check._asdict() for check in checks]}, [*_lines(checks), "", _summary(checks)], error)


def _subject(app: App, flags: Flags) -> Subject:
    file: Path | None = None
    try:
        file = file_in_force(app)
        document: Document | LaunchError = document_in_force(app)
    except LaunchError as error:
        document = error
    known = [_instance(path) for path in instances.all_of(app.state_dir)]
    return Subject(
        flags, os.environ, current_directory(), app.state_dir, file, document, known, app.typed, _start(app, flags)
    )


def _start(app: App, flags: Flags) -> str:
    """The command that starts what these flags mean."""
    given = {"mode": flags.mode, "model": flags.model, "port": flags.port, "host": flags.host}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--demo"] if flags.demo else []
    return " ".join([app.typed("start", defaults.PORT), *map(shlex.quote, options)])


def _instance(path: Path) -> Instance:
    state = instances.remembered(path)
    status: dict[str, Any] = state.get("status", {})
    running, trouble = instances.is_locked(path), None
    if running:
        try:
            status = control.call(os.fspath(path), {"do": "status"}, _ANSWER_S)["data"]
        except (LaunchError, KeyError) as error:
            trouble = error.message if isinstance(error, LaunchError) else "its supervisor answers nonsense"
    return Instance(path, running, status, trouble, state)


def _lines(checks: list[Check]) -> list[str]:
    """One finding below the other, never wider than the screen; a remedy is not broken up, because it is there to be copied."""
    lines = []
    for check in checks:
        text = wrapped(clean(check.found), WIDTH - _RESULT - _NAME)
        lines.append(f"{_painted(check.result)}{check.name:{_NAME}}{text[0]}")
        lines += [" " * (_RESULT + _NAME) + more for more in text[1:]]
        if check.remedy:
            lines.append(" " * _RESULT + f"$ {clean(check.remedy)}")
    return lines


def _painted(result: str) -> str:
    padded = f"{result:{_RESULT}}"
    colour = _COLOURS.get(result)
    return click.style(padded, fg=colour) if colour and may_paint(sys.stdout) else padded


def _summary(checks: list[Check]) -> str:
    counts = {
        result: sum(check.result == result for check in checks) for result in ("ok", "warning", "failed", "skipped")
    }
    return ", ".join(f"{count} {result}" for result, count in counts.items() if count)
