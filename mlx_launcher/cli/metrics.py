"""`mlx-launch metrics`: what a server does and has done, in the format that monitoring reads."""

import click

from mlx_launcher.cli.instances import ask, choose
from mlx_launcher.cli.options import json_option, which_option
from mlx_launcher.cli.output import App, Result


@click.command("metrics")
@which_option
@json_option
@click.pass_obj
def command(app: App, port: int | None) -> Result:
    """Print what the server does and has done, as OpenMetrics text.

    The supervisor answers, so that an idle model stays idle; with metricsPort in the configuration it also answers
    http://127.0.0.1:METRICSPORT/metrics. Exits with 3 when nothing is running.
    """
    metrics = ask(choose(app.state_dir, port), {"do": "metrics"})
    return Result(metrics, metrics["text"].removesuffix("\n").split("\n"))
