"""`mlx-launch rollback`: to the fallback, checked first, proved, and only then written into the user's file; and back."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from mlx_launcher.backends.checks import Check, Target, check_around, check_target, fallback_name, find_target
from mlx_launcher.cli import rollback_file as files
from mlx_launcher.cli.configured import current_directory, document_in_force
from mlx_launcher.cli.instances import ask
from mlx_launcher.cli.options import json_option, which_option
from mlx_launcher.cli.output import App, Result
from mlx_launcher.cli.rollback_switch import Running, running, wait
from mlx_launcher.cli.screen import serves
from mlx_launcher.config import document, edit, first
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.errors import EXIT_FAILED, EXIT_USAGE, LaunchError

_REASON = "mlx-launch rollback"
# The server may still come up with what the file says now.
_GOES_ON = ("interrupted", "overtaken", "no_answer", "out_of_reach")


@click.command("rollback")
@click.option(
    "--to", metavar="BACKEND", help="The backend to go to. [default: the configured one's fallback, mlx-legacy]"
)
@click.option("--check", is_flag=True, help="Make all the checks, show each result, and change nothing.")
@click.option("--undo", is_flag=True, help="Go back to what was configured before the rollback.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@which_option
@json_option
@click.pass_obj
def command(app: App, to: str | None, check: bool, undo: bool, yes: bool, port: int | None) -> Result:
    """Switch to the fallback, wait for its proof, and write it into the configuration file.

    The address and the names of the model stay. A fallback that does not prove itself changes nothing: the server that ran
    is brought back. Where nothing runs, the file alone is changed, and the next start uses it.
    """
    if undo and (to is not None or check):
        raise LaunchError("usage", "--undo goes with neither --to nor --check", "Give --undo alone", EXIT_USAGE)
    job = _Job(app, port)
    if check:
        return _show_checks(job, to)
    return _undo(job, yes) if undo else _rollback(job, to, yes)


class _Job:
    """What a rollback works with: the file in force, what it means, and the server that runs, if one does.

    Where no command line says otherwise, the file is that which the server was started with.
    """

    def __init__(self, app: App, port: int | None) -> None:
        self.app = app
        self.cwd = current_directory()
        self.document = document_in_force(app)
        self.running: Running | None = running(app, port, self._configured_port())
        if self.running and (file := self._its_file(self.running)):
            self.document = document.read(file)
        self.settings: Settings = self._settle(port)

    def _its_file(self, server: Running) -> Path | None:
        """None where another one was named here, where it is gone, and where the server had none."""
        name = None if self.app.config or self.app.no_config else server.status.get("config")
        return Path(name) if name and os.path.isfile(name) else None  # noqa: PTH113

    def _configured_port(self) -> int | None:
        try:
            return int(settle(Flags(), os.environ, self.document)["port"])
        except LaunchError:  # a mode that needs no server, for one; what runs may have been started with flags
            return None

    def _settle(self, port: int | None) -> Settings:
        """What the file means for the server that runs, whose port and mode may have come from flags."""
        if self.running is None:
            return settle(Flags(port=port), os.environ, self.document)
        own = Flags(port=self.running.port, mode=self.running.status["configured_backend"])
        try:
            return settle(own, os.environ, self.document)
        except LaunchError:  # the file does not know it
            return settle(own._replace(mode=None), os.environ, self.document)

    def checks(self, target: Target) -> list[Check]:
        model = self.running.status["model"]["path"] if self.running else None
        around = check_around(self.settings, target, os.environ, self.cwd, model)
        return [*check_target(target, self.app.state_dir), *around]

    def target(self, to: str | None) -> Target:
        return find_target(self.settings, to, self.cwd, self.app.state_dir, self.app.state_dir_given)

    def change(self, wanted: str | None) -> files.Change | files.Unchanged:
        """The edit of the file; `wanted` is the new serverScript, None for the one before the rollback."""
        status = self.running.status if self.running else None
        return files.change(self.settings, status, self.cwd, self.app.state_dir, wanted)


def _show_checks(job: _Job, to: str | None) -> Result:
    target = job.target(to)
    made = job.checks(target)
    lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:14}{check.message}" for check in made]
    data = {"from": job.settings.block, "to": target.name, "script": str(target.script), "checks": _as_json(made)}
    return Result(data, lines, _failed(made, target))


def _as_json(made: list[Check]) -> list[dict[str, Any]]:
    return [check._asdict() for check in made]


def _failed(made: list[Check], target: Target) -> LaunchError | None:
    bad = [check for check in made if not check.ok]
    if not bad:
        return None
    more = f" (and {len(bad) - 1} more, see mlx-launch rollback --check)" if len(bad) > 1 else ""
    what = f"a rollback to {target.name} is refused: {bad[0].name}: {bad[0].message}{more}"
    return LaunchError("check_failed", what, bad[0].hint, EXIT_FAILED)


def _rollback(job: _Job, to: str | None, yes: bool) -> Result:
    target = job.target(to)
    if to is None and files.is_legacy(job.settings, job.cwd):
        return _already(job)
    if job.running:
        _refuse_other(job, target)
    change = job.change(target.written)
    made = job.checks(target)
    if error := _failed(made, target):
        return Result({"checks": _as_json(made)}, [], error)
    # Only a fallback that has proved itself is written into the file.
    switches = job.running is not None and not (job.running.rolled_back and serves(job.running.status))
    if not switches and isinstance(change, files.Unchanged):
        _install(job, target, change)
        return Result(_data(job, target.name, change), [change.why])
    plan = [f"The server at {job.running.url} goes to {target.name}."] if switches and job.running else []
    _confirm(job.app, yes, [*plan, *change.plan])
    _install(job, target, change)
    lines = []
    if job.running and switches:
        status = _switch(job, job.running, "fallback", target.name, _REASON)
        lines.append(f"{status['backend']} serves at {status['url']}.")
    return _written(job, target.name, change, lines, bool(switches))


def _install(job: _Job, target: Target, change: files.Change | files.Unchanged) -> None:
    """Our script, where the file is going to name it and it is not there yet."""
    wanted = isinstance(change, files.Change) or change.by_hand
    if wanted and target.ours is not None and not target.script.exists():
        first.install_script(job.app.state_dir, job.app.state_dir_given, first.LEGACY_SCRIPT_NAME)


def _undo(job: _Job, yes: bool) -> Result:
    change = job.change(None)
    switched = job.running is not None and job.running.rolled_back
    if not switched and isinstance(change, files.Unchanged):
        raise LaunchError("nothing_to_undo", f"there is no rollback to undo: {change.why.rstrip('.')}", change.hint)
    name = job.running.status["configured_backend"] if job.running else job.settings.block
    plan = [f"The server at {job.running.url} goes back to {name}."] if job.running else []
    _confirm(job.app, yes, [*plan, *change.plan])
    if job.running and not switched:
        assert isinstance(change, files.Change)  # noqa: S101 - else there was nothing to undo
        return _undo_restarted(job, job.running, change)
    lines = []
    if job.running:
        status = _switch(job, job.running, "configured", name, f"{_REASON} --undo")
        lines.append(f"{status['backend']} serves at {status['url']}.")
    return _written(job, name, change, lines, switched)


def _undo_restarted(job: _Job, server: Running, change: files.Change) -> Result:
    """The server was started from the file as the rollback left it, so the file has to come first; taken back if it fails."""
    backup = edit.write(change.source, change.text)
    try:
        number = ask(server.instance, {"do": "restart"})["reload_id"]
        status = wait(job.app, server, number, job.settings.block)
    except LaunchError as error:
        if error.code not in _GOES_ON:
            _put_back(change, backup, error)
        raise
    lines = [f"{status['backend']} serves at {status['url']}.", *change.done, f"The file before is {backup}."]
    return Result(_data(job, job.settings.block, change, backup, True), lines)


def _put_back(change: files.Change, backup: Path, error: LaunchError) -> None:
    try:
        written = edit.read(change.source.file)._replace(data=change.text.encode())
        edit.write(written, change.source.text).unlink()
        backup.unlink(missing_ok=True)
    except (LaunchError, OSError) as second:
        error.message += f"; and the file could not be put back: {second}"
    else:
        error.message += f"; {change.source.file} is again what it was"


def _switch(job: _Job, server: Running, to: str, name: str, reason: str) -> dict[str, Any]:
    request = {"do": "switch", "to": to, "reason": reason, "automatic": False}
    try:
        return wait(job.app, server, ask(server.instance, request)["reload_id"], name)
    except LaunchError as error:
        error.message += "; no file was changed"
        raise


def _written(job: _Job, name: str, change: files.Change | files.Unchanged, lines: list[str], switched: bool) -> Result:
    """The last step: the server is where it should be, now the file follows."""
    if isinstance(change, files.Unchanged):
        return Result(_data(job, name, change, None, switched), [*lines, change.why])
    try:
        backup = edit.write(change.source, change.text)
    except LaunchError as error:
        if switched:
            error.message = f"{name} serves now, but {error.message}"
        return Result(_data(job, name, None, None, switched), lines, error)
    lines += [*change.done, f"The file before is {backup}."]
    lines += [] if job.running else ["Nothing runs: the next start uses it."]
    return Result(_data(job, name, change, backup, switched), lines)


def _refuse_other(job: _Job, target: Target) -> None:
    """A running server can go only to the fallback that it was started with."""
    fallback = fallback_name(job.settings)
    if fallback is not None and target.name != fallback:
        what = f"the server that runs can go to its fallback {fallback} only, not to {target.name}"
        hint = f'Set "fallback": "{target.name}" in backends.{job.settings.block} and restart, then roll back'
        raise LaunchError("other_fallback", what, hint)


def _already(job: _Job) -> Result:
    why = f"{job.document.name}: backends.{job.settings.block} is served by the legacy server already."
    lines = [why, "restart uses the file as it is now."] if job.running and not job.running.rolled_back else [why]
    return Result(_data(job, job.settings.block, None), lines)


def _confirm(app: App, yes: bool, plan: list[str]) -> None:
    """Asks on a terminal; where nobody can be asked, --yes has to say it."""
    if yes:
        return
    if app.json or not _is_terminal():
        what = "nobody can be asked here whether to go on"
        raise LaunchError("usage", what, "Give --yes, or look first with --check", EXIT_USAGE)
    for line in plan:
        click.echo(line, err=True)
    if not click.confirm("Go on?", err=True):
        raise LaunchError("declined", "nothing was changed")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _data(
    job: _Job,
    to: str,
    change: files.Change | files.Unchanged | None,
    backup: Path | None = None,
    switched: bool = False,
) -> dict[str, Any]:
    edited = isinstance(change, files.Change) and backup is not None
    return {
        "from": job.running.status["backend"] if job.running else job.settings.block,
        "to": to,
        "url": job.running.url if job.running else None,
        "switched": switched,
        "edited": edited,
        "file": str(job.document.file) if job.document.file else None,
        "key": f"backends.{job.settings.block}.serverScript",
        "before": change.before if isinstance(change, files.Change) else None,
        "after": change.after if isinstance(change, files.Change) else None,
        "backup": str(backup) if backup else None,
        "why_not_edited": change.why if isinstance(change, files.Unchanged) else None,
    }
