"""`mlx-launch plan`: the plan itself, for a supervisor that is told to restart or to reload."""

import sys
from typing import Any

import click

from mlx_launcher.cli.launch import make_plan
from mlx_launcher.cli.options import json_option, log_file_option, server_options
from mlx_launcher.cli.output import App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.config.layers import Flags
from mlx_launcher.errors import EXIT_USAGE, LaunchError


@click.command("plan", hidden=True)
@server_options
@log_file_option
@json_option
@click.pass_obj
def command(app: App, /, **server: Any) -> Result:
    """Print the plan that `start` would hand to its supervisor. It may hold keys, so only --json gives it."""
    if not app.json:
        raise LaunchError("usage", "a plan may hold keys and is for programs only", "Give --json", EXIT_USAGE)
    with Progress(sys.stderr, quiet=False) as progress:
        plan = make_plan(app, Flags(**server), progress.show)
    return Result(dict(plan), [])
