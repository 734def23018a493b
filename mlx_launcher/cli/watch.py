"""`mlx-launch status --watch`: the same place once a second on a terminal, one block after the other elsewhere."""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from mlx_launcher.cli.instances import ask, failure, last_status, not_running
from mlx_launcher.cli.output import App, Result, abandon_stdout, paint, render, unwritable
from mlx_launcher.cli.screen import WIDTH
from mlx_launcher.cli.watch_screen import Rate, picture
from mlx_launcher.errors import EXIT_NOT_RUNNING, LaunchError

EVERY_S = 1.0
_ENDLESS = 1000  # lines of what is no terminal
# A supervisor that is stopped (Ctrl-Z) answers again one day.
_PASSING = {
    "no_answer": "the supervisor does not answer: it is stopped (Ctrl-Z), or the machine is overloaded",
    "out_of_reach": "the supervisor is starting or ending",
}
# The alternate screen without a cursor, and back: what was there before is there again.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _ERASE_LINE, _ERASE_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(app: App, instance: Path) -> Result:
    """Shows the status until the supervisor ends, and then how; or until Ctrl-C, which is how one leaves.

    LaunchError as `status`, where nothing is running. An end that nobody asked for is the result's error.
    """
    status = ask(instance, {"do": "status"})
    with contextlib.ExitStack() as stack:
        try:
            wake = stack.enter_context(_signals())
            moves = not app.json and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
            if moves:
                stack.enter_context(_screen_of_its_own())
            _show(app, instance, status, moves, wake)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(0) from None
        except BrokenPipeError:
            abandon_stdout()
            raise click.exceptions.Exit(0) from None
        except OSError as full:
            raise unwritable(full) from None
    return _ended(app, instance)


def _show(app: App, instance: Path, status: dict[str, Any], moves: bool, wake: int) -> None:
    """Returns when there is no supervisor any more."""
    rate, trouble = Rate(), None
    while True:
        shown = rate.seen(time.monotonic(), status)
        due = time.monotonic() + EVERY_S
        resized = True
        while resized:
            _draw(app, status, shown, trouble, moves)
            resized = _woken(wake, due - time.monotonic()) and moves
        try:
            status, trouble = ask(instance, {"do": "status"}), None
        except LaunchError as error:
            if error.code not in _PASSING:
                return
            trouble = _PASSING[error.code]


def _draw(app: App, status: dict[str, Any], rate: float | None, trouble: str | None, moves: bool) -> None:
    if app.json:
        if code := render(app, Result(status, [])):
            raise click.exceptions.Exit(code)
        return
    width, height = shutil.get_terminal_size() if moves else (WIDTH + 1, _ENDLESS)
    # The last column is left free: what is erased after a character there would take it along.
    lines = picture(status, rate, time.time(), width - 1, height, trouble)
    lines[0] = lines[0].replace(f": {status['state']}", f": {paint(status['state'], sys.stdout)}", 1)
    if moves:
        click.echo(_HOME + "\n".join(_ERASE_LINE + line for line in lines) + _ERASE_BELOW, nl=False)
    else:
        click.echo("\n".join([*lines, ""]))
    sys.stdout.flush()


def _woken(wake: int, timeout_s: float) -> bool:
    """Waits; whether a signal ended the wait."""
    if not select.select([wake], [], [], max(0.0, timeout_s))[0]:
        return False
    os.read(wake, 4096)
    return True


def _ended(app: App, instance: Path) -> Result:
    last = last_status(instance)
    if last.get("state") == "stopped":
        return Result(last, [f"the server on port {instance.name} was stopped"])
    if last.get("state") == "failed":
        return Result(last, [], failure(app, last, EXIT_NOT_RUNNING))
    return Result(last, [], not_running(instance))


@contextlib.contextmanager
def _screen_of_its_own() -> Iterator[None]:
    click.echo(_ENTER, nl=False)
    try:
        yield
    finally:
        try:
            click.echo(_LEAVE, nl=False)
            sys.stdout.flush()
        except OSError:  # its window was closed
            abandon_stdout()


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that can be read when the terminal has another size; SIGTERM and SIGHUP end us in good order."""
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
