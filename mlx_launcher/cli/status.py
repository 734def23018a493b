"""`mlx-launch status`: what runs, on one screen."""

import click

from mlx_launcher.cli.instances import ask, choose, failure, last_status, log_file, log_trouble
from mlx_launcher.cli.options import json_option, which_option
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.screen import WIDTH, failed_screen, fit, row, status_screen
from mlx_launcher.errors import EXIT_NOT_RUNNING, LaunchError

_LOG_LINES = 5


@click.command("status")
@click.option("--watch", "watching", is_flag=True, help="Show it again every second, until Ctrl-C.")
@which_option
@json_option
@click.pass_obj
def command(app: App, watching: bool, port: int | None) -> Result:
    """Show what is running and how it is doing.

    Exits with 3 when nothing is running, and when the server gave up; it then shows why.
    """
    instance = choose(app.state_dir, port)
    try:
        if watching:
            from mlx_launcher.cli.watch import watch  # what a look needs is loaded without it

            return watch(app, instance)
        status = ask(instance, {"do": "status"})
    except LaunchError as error:
        last = last_status(instance)
        if error.code != "not_running" or last.get("state") != "failed":
            raise
        lines = failed_screen(last, log_file(instance), _LOG_LINES)
        return Result(last, lines, failure(app, last, EXIT_NOT_RUNNING))
    lines = status_screen(status)
    if why := log_trouble(instance):
        lines.append(fit(row("not kept", clean(why)), WIDTH))
    return Result(status, lines)
