"""What every command says and how: lines for people, one JSON object for scripts, one line for an error."""

import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from mlx_launcher.config import defaults
from mlx_launcher.errors import LaunchError

# What --help does not need is imported where it is used: pathlib alone is a tenth of its time.
if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = "mlx-launch"
EXIT_INTERRUPTED = 130
_COLOURS = {"ready": "green", "idle": "green", "degraded": "yellow", "restarting": "yellow", "failed": "red"}


class Result(NamedTuple):
    """What a command hands back: `data` for scripts, `lines` for people, and `error` when it did not do what was asked.

    A result may carry all three: a server that failed has a status and a log that are worth seeing.
    """

    data: dict[str, Any]
    lines: list[str]
    error: LaunchError | None = None


class App:
    """What the commands share: where the state lives, and which form of output was asked for."""

    state_dir: "Path"  # set before any command runs

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        # Looked for here and not left to the parser, because what the parser refuses has to be told in JSON too.
        self.json = "--json" in arguments
        self.command: str | None = None
        # These are set before any command runs.
        self.state_dir_given = False  # by a flag, which has to be given again to mean the same server
        self.config: str | None = None  # what --config names
        self.no_config = False

    def typed(self, command: str, port: int) -> str:
        """A command as it has to be typed to mean the server on this port, with the configuration that was given here."""
        import shlex

        words = [_program()]
        if self.state_dir_given:
            words += ["--state-dir", str(self.state_dir)]
        if self.config is not None:
            words += ["--config", self.config]
        words += ["--no-config"] if self.no_config else []
        words.append(command)
        if port != defaults.PORT:
            words += ["--port", str(port)]
        return shlex.join(words)


def _program() -> str:
    """What to type for this command: its path where the name alone finds no or another one (an environment not activated)."""
    from pathlib import Path

    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return PROGRAM
    import shutil

    found = shutil.which(PROGRAM)
    return PROGRAM if found and called.exists() and called.samefile(found) else os.path.abspath(called)  # noqa: PTH100


def render(app: App, result: Result) -> int:
    """Writes a result and returns the exit code, that of its error whether anybody reads it or not.

    Raises BrokenPipeError when nobody reads a result without an error.
    """
    error = result.error
    try:
        _write(app, result)
    except BrokenPipeError:
        if error is None:
            raise
        abandon_stdout()
    except OSError as full:
        error = error or unwritable(full)
    if error is None:
        return 0
    try:
        click.echo(error_line(error), err=True)
    except OSError:
        _abandon(2)
    return error.exit_code


def _write(app: App, result: Result) -> None:
    error = result.error
    if app.json:
        envelope = {
            "schema": 1,
            "command": app.command,
            "ok": error is None,
            "data": result.data,
            "errors": [error.as_json()] if error else [],
        }
        import json

        click.echo(json.dumps(envelope))
    else:
        for line in result.lines:
            click.echo(line)
    sys.stdout.flush()


def unwritable(reason: OSError) -> LaunchError:
    return LaunchError("output", f"the output cannot be written: {reason.strerror}")


def error_line(error: LaunchError) -> str:
    """`mlx-launch: what, where. What to do.` on one line, whatever the parts hold."""
    text = ". ".join(clean(part).rstrip(".") for part in (error.message, error.hint) if part)
    return f"mlx-launch: {text}{'' if text.endswith('?') else '.'}"


def clean(text: str) -> str:
    """One printable line: log lines, paths and model names may hold anything, terminal commands included."""
    # Spaces beside each other stay: a path may have them, and a command that names it is there to be copied.
    parts = filter(None, (part.strip() for part in re.split(r"[^\S ]+", text)))
    return "".join(char if char.isprintable() else "?" for char in " ".join(parts))


def abandon_stdout() -> None:
    """After a broken pipe: whoever read us has read enough, and the interpreter would complain when it flushes at exit."""
    _abandon(1)


def _abandon(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def paint(state: str, stream: TextIO) -> str:
    """The name of a state, coloured where that is wanted."""
    colour = _COLOURS.get(state)
    return click.style(state, fg=colour) if colour and may_paint(stream) else state


def may_paint(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def internal_error(app: App, error: Exception) -> LaunchError:
    """A bug as an error of one line; its traceback goes to a file, so that a report can carry it."""
    kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return LaunchError("internal", f"unexpected error, {kind}", _keep_details(app, error))


def _keep_details(app: App, error: Exception) -> str:
    # Only a bug pays for these: they take longer to import than the rest of the command.
    import tempfile
    import traceback

    details = "".join(traceback.format_exception(error))
    for directory in (getattr(app, "state_dir", None), tempfile.gettempdir()):
        try:
            # Where there is no state directory yet, a failed command is no reason to make one.
            descriptor, path = tempfile.mkstemp(prefix="mlx-launch-error-", suffix=".txt", dir=directory)
        except OSError:
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
        return f"The details are in {path}"
    return "The details could not be written anywhere"
