"""`mlx-launch restart`: the configuration read anew, checked before anything is stopped, and taken back if it does not work."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.instances import ask, choose, failure, last_status, log_file, not_running
from mlx_launcher.cli.options import json_option, which_option
from mlx_launcher.cli.output import EXIT_INTERRUPTED, App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.cli.screen import failed_screen, phase_text, serves
from mlx_launcher.errors import EXIT_FAILED, LaunchError

_POLL_S = 0.1
_LOG_LINES = 15
_UNDER_WAY = ("planning", "switching")


@click.command("restart")
@which_option
@json_option
@click.pass_obj
def command(app: App, port: int | None) -> Result:
    """Restart the server with its configuration as it is now.

    The configuration is checked before anything is stopped. Requests in flight are finished, others wait in line meanwhile.
    A configuration that does not come up is replaced by the last one that did.
    """
    instance = choose(app.state_dir, port)
    number = ask(instance, {"do": "restart"})["reload_id"]
    try:
        return _wait(app, instance, number)
    except KeyboardInterrupt:
        what = f"interrupted, the server on port {instance.name} goes on restarting"
        raise LaunchError("interrupted", what, f"See {_status(app, instance)}", EXIT_INTERRUPTED) from None


def _wait(app: App, instance: Path, number: int) -> Result:
    with Progress(sys.stdout, quiet=app.json) as progress:
        while True:
            try:
                status = ask(instance, {"do": "status"})
            except LaunchError as error:
                if error.code != "not_running":
                    raise
                return _ended(app, instance)
            reload = status["reload"]
            if reload["id"] != number:
                raise LaunchError("overtaken", "another restart followed", f"See {_status(app, instance)}")
            if reload["state"] == "refused":
                return _refused(status)
            if reload["state"] == "done" and (serves(status) or reload["trigger"] == "SIGHUP"):
                return Result(status, [*_changes(reload), f"Restarted. Ready at {status['url']}."])
            if reload["state"] == "reverted" and serves(status):
                return _reverted(app, status)
            progress.show("planning" if reload["state"] == "planning" else phase_text(status), status["progress"])
            time.sleep(_POLL_S)


def _changes(reload: dict[str, Any]) -> list[str]:
    return [f"  {change}" for change in reload["changes"]] or ["  no change in the configuration"]


def _refused(status: dict[str, Any]) -> Result:
    reload = status["reload"]
    what = f"{reload['reason'].rstrip('.')}; nothing was stopped"
    return Result(status, [], LaunchError("refused", what, reload["hint"], reload["exit"]))


def _reverted(app: App, status: dict[str, Any]) -> Result:
    reason = status["reload"]["reason"].rstrip(".")
    if status["rollback"]:
        what = f"{status['configured_backend']} did not come up: {reason}; {status['backend']} serves again"
    else:
        what = f"the new configuration did not come up: {reason}; the last one that worked serves again"
    hint = f"The log tells more, see {app.typed('logs', status['port'])}"
    return Result(status, _changes(status["reload"]), LaunchError("reverted", what, hint, EXIT_FAILED))


def _ended(app: App, instance: Path) -> Result:
    """What to say when the supervisor is gone while we waited."""
    last = last_status(instance)
    if last.get("state") == "failed":
        lines = failed_screen(last, log_file(instance), _LOG_LINES)
        return Result(last, lines, failure(app, last, EXIT_FAILED))
    if last.get("state") == "stopped":
        raise LaunchError("stopped", f"the server on port {instance.name} was stopped while it restarted")
    raise LaunchError("supervisor_gone", not_running(instance).message, "Start it again")


def _status(app: App, instance: Path) -> str:
    return app.typed("status", int(instance.name))
