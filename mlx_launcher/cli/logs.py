"""`mlx-launch logs`: the server's log, or the supervisor's journal made readable."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from mlx_launcher.cli.instances import choose, log_file, log_trouble
from mlx_launcher.cli.options import Whole, json_option, which_option
from mlx_launcher.cli.output import App, Result, abandon_stdout, clean, unwritable
from mlx_launcher.cli.tail import follow, last_lines
from mlx_launcher.errors import EXIT_USAGE, LaunchError


@click.command("logs")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on showing what is written, until Ctrl-C.")
@click.option(
    "-n",
    "count",
    type=Whole(min=0),
    metavar="N",
    default=50,
    show_default=True,
    help="How many lines to show.",
)
@click.option("--supervisor", is_flag=True, help="The supervisor's journal: starts, exits, restarts and their reasons.")
@which_option
@json_option
@click.pass_obj
def command(app: App, following: bool, count: int, supervisor: bool, port: int | None) -> Result:
    """Show the end of the server's log, of one that has ended too."""
    instance = choose(app.state_dir, port)
    path = instance / "journal.jsonl" if supervisor else log_file(instance)
    if following and app.json:
        raise LaunchError("usage", "--follow never ends, so it has no JSON to give", "Leave one of the two", EXIT_USAGE)
    if following:
        blocks = follow(path, count, sys.stdout.fileno())
        _show(_journal_lines(blocks) if supervisor else blocks)
        return Result({}, [])
    if not supervisor and (why := log_trouble(instance)):
        hint = f"{app.typed('doctor', int(instance.name))} has the remedy"
        raise LaunchError("no_log", f"{why}: what goes there is not kept", hint)
    _require(path)
    lines = last_lines(path, count)
    if supervisor:
        events = [_parse(line) for line in lines]
        return Result({"file": str(path), "events": events}, [event_line(event) for event in events])
    return Result({"file": str(path), "lines": lines}, lines)


def _require(path: Path) -> None:
    """LaunchError `no_log` for what is no log that we can read."""
    if not os.path.exists(path):  # noqa: PTH110 - which raises for what it may not look at
        raise LaunchError("no_log", f"there is no log at {path}", "It is begun when a server starts")
    if not os.path.isfile(path):  # noqa: PTH113
        raise LaunchError("no_log", f"{path} is no file: what goes there is not kept", "Give run another --log-file")
    if not os.access(path, os.R_OK):
        raise LaunchError("no_log", f"the log {path} cannot be read", "See whose it is, with ls -l")


def event_line(event: dict[str, object]) -> str:
    """A journal line for people: when, what, and whatever belongs to it."""
    rest = [
        f"{key}={value if isinstance(value, str) and ' ' not in value else json.dumps(value, ensure_ascii=False)}"
        for key, value in event.items()
        if key not in ("at", "event") and value is not None
    ]
    return clean(" ".join([str(event.get("at", "")), str(event.get("event", "")), *rest]))


def _parse(line: str) -> dict[str, object]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    # Torn by a full disk or a kill; it is shown all the same.
    return event if isinstance(event, dict) else {"event": "unreadable", "line": line}


def _journal_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield b"".join(event_line(_parse(line.decode("utf-8", "replace"))).encode() + b"\n" for line in lines if line)


def _show(blocks: Iterable[bytes]) -> None:
    try:
        for block in blocks:
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        pass  # how one leaves
    except BrokenPipeError:
        abandon_stdout()
    except OSError as full:
        raise unwritable(full) from None
