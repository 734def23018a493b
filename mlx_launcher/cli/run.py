"""`mlx-launch run`: the supervisor in the foreground, under the same pid."""

import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from mlx_launcher import system
from mlx_launcher.cli.instances import ask
from mlx_launcher.cli.joining import join
from mlx_launcher.cli.launch import SUPERVISOR, make_plan, plan_file, show_notes, supervisor_environment
from mlx_launcher.cli.options import json_option, log_file_option, server_options
from mlx_launcher.cli.output import App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.config.layers import Flags
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.plan import Plan

_POLL_S = 0.1


@click.command("run")
@server_options
@log_file_option
@click.option(
    "--with-caller", is_flag=True, help="End when whoever started this is gone, as anyclaude's serverScript has to."
)
@click.option(
    "--service",
    is_flag=True,
    help="For systemd or launchd: with idleTimeout, nothing is loaded before it is asked for.",
)
@json_option
@click.pass_obj
def command(app: App, /, with_caller: bool, service: bool, **server: Any) -> Result:
    """Run a server in the foreground until Ctrl-C or a signal stops it.

    This is what a service manager starts. `mlx-launch start` does the same in the background.
    """
    if app.json:
        hint = "Use start --json, or status --json while it runs"
        raise LaunchError("usage", "run has no JSON to give, it goes on until it is stopped", hint, EXIT_USAGE)
    if service and with_caller:
        hint = "--service is for systemd and launchd, --with-caller for anyclaude's serverScript"
        raise LaunchError("usage", "--service and --with-caller exclude each other", hint, EXIT_USAGE)
    try:
        _require_log(server["log_file"])
        with Progress(sys.stdout, quiet=False) as progress:
            plan = make_plan(app, Flags(**server), progress.show)
    except LaunchError as error:
        if service:
            error.exit_code = system.service_exit_code(error.exit_code)
        raise
    show_notes(app, plan)
    if with_caller and (running := _running(plan)):
        join(Path(plan["instance"]), running, plan["model"]["path"])
        return Result({}, [])
    if service:
        return _become_supervisor(plan, "--service", "--idle")
    return _become_supervisor(plan, "--with-caller" if with_caller else "--foreground")


def _require_log(path: str | None) -> None:
    """LaunchError `usage` for a log that could not be written, as nobody would be told: a server does not end for its log."""
    if path is None:
        return
    there = Path(path)
    while not there.exists():
        there = there.parent
    if there.is_dir() is (there == Path(path)):
        what = f"{there} is {'a' if there.is_dir() else 'no'} directory"
    elif not os.access(there, os.W_OK):
        what = f"{there} cannot be written to"
    else:
        return
    raise LaunchError("usage", f"--log-file: {what}", "Name a file in a directory of yours", EXIT_USAGE)


def _become_supervisor(plan: Plan, *manner: str) -> NoReturn:
    file = plan_file(plan)
    os.set_inheritable(file.fileno(), True)
    argv = [*SUPERVISOR, "--plan-fd", str(file.fileno()), *manner]
    os.execve(argv[0], argv, supervisor_environment())  # noqa: S606


def _running(plan: Plan) -> dict[str, Any] | None:
    """The status of a supervisor that has the plan's port already; None where there is none, or none any more."""
    while True:
        try:
            status = ask(Path(plan["instance"]), {"do": "status"})
        except LaunchError as error:
            if error.code == "not_running":
                return None
            raise
        if not status["draining"]:
            return status
        time.sleep(_POLL_S)  # whether it stops or restarts shows when its server has ended
