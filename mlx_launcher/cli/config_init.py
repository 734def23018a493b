"""`mlx-launch config init`: a first configuration file, with our server script where anyclaude can start it."""

import os
from pathlib import Path

import click

from mlx_launcher.backends.models import find_model
from mlx_launcher.backends.serving import Caller
from mlx_launcher.cli.configured import current_directory
from mlx_launcher.cli.launch import build_demo_model
from mlx_launcher.cli.options import json_option, port_option
from mlx_launcher.cli.output import App, Result
from mlx_launcher.config import defaults, first
from mlx_launcher.config.document import NAMES, nothing
from mlx_launcher.config.layers import Flags, settle
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.errors import LaunchError


@click.command("init")
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--model", metavar="DIR", help="The model to serve, a directory or org/name. [default: the demo model]")
@port_option
@click.option("--force", is_flag=True, help="Replace a file that is there; a copy of it is kept.")
@json_option
@click.pass_obj
def command(app: App, file: str | None, model: str | None, port: int | None, force: bool) -> Result:
    """Write a configuration file that anyclaude's mode mlx works with at once, and mlx-launch too.

    It puts our server script into the state directory, because anyclaude needs a path without spaces.
    """
    target = Path(current_directory(), os.path.expanduser(file or app.config or NAMES[0]))  # noqa: PTH111
    first.refuse_existing(target, force)
    create_state_dir(app.state_dir)
    path = _model_path(app, model)
    script = first.install_script(app.state_dir, app.state_dir_given)
    content = first.content(path, port or defaults.PORT, script)
    backup = first.write(target, content, force)
    notes = first.what_anyclaude_misses(target, path)
    lines = [f"Wrote {target}.", f"Its server script is {script}."]
    lines += [f"The file that was there is kept as {backup}."] if backup else []
    lines += [] if model else ["It serves the demo model: put the path of a model of yours in its place."]
    lines += [f"note: {note}." for note in notes]
    data = {"file": str(target), "script": str(script), "backup": str(backup) if backup else None, "notes": notes}
    return Result(data, lines)


def _model_path(app: App, model: str | None) -> str:
    if model is None:
        return str(build_demo_model(app.state_dir))
    cwd = current_directory()
    settings = settle(Flags(model=model), {}, nothing(cwd))
    found = find_model(settings, app.state_dir, Caller([], cwd, os.environ), say=_say)
    if found is None:
        raise LaunchError("no_model", "the name of the model is empty", "Give a directory or org/name")
    return found.model["path"]


def _say(what: str, _: dict[str, int]) -> None:
    click.echo(what, err=True)
