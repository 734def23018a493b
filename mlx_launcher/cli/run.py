"""`mlx-launch run`: the supervisor in the foreground, under the same pid."""

import os
import sys
from typing import Any

import click

from mlx_launcher.cli.launch import SUPERVISOR, make_plan, plan_file, show_notes, supervisor_environment
from mlx_launcher.cli.options import json_option, log_file_option, server_options
from mlx_launcher.cli.output import App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.config.layers import Flags
from mlx_launcher.errors import EXIT_USAGE, LaunchError


@click.command("run")
@server_options
@log_file_option
@json_option
@click.pass_obj
def command(app: App, /, **server: Any) -> Result:
    """Run a server in the foreground until Ctrl-C or a signal stops it.

    This is what a service manager starts. `mlx-launch start` does the same in the background.
    """
    if app.json:
        hint = "Use start --json, or status --json while it runs"
        raise LaunchError("usage", "run has no JSON to give, it goes on until it is stopped", hint, EXIT_USAGE)
    with Progress(sys.stdout, quiet=False) as progress:
        plan = make_plan(app, Flags(**server), progress.show)
    show_notes(app, plan)
    file = plan_file(plan)
    os.set_inheritable(file.fileno(), True)
    argv = [*SUPERVISOR, "--plan-fd", str(file.fileno()), "--foreground"]
    os.execve(argv[0], argv, supervisor_environment())  # noqa: S606
