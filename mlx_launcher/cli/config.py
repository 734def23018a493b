"""`mlx-launch config`: what is in force and where it came from, what is wrong with it, and a first file."""

import json
import os
from typing import Any

import click

from mlx_launcher.cli.configured import current_directory, document_in_force, file_in_force
from mlx_launcher.cli.groups import Table
from mlx_launcher.cli.options import json_option, server_options
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.config import document
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.errors import EXIT_CONFIG, EXIT_FAILED, LaunchError

_COMMANDS = {
    "show": "Show the values in force.",
    "validate": "Check the whole file and list everything that is wrong with it.",
    "init": "Write a configuration file that anyclaude and mlx-launch both work with.",
    "schema": "Print the JSON Schema of the file, for editors.",
    "path": "Print which file is in force.",
}


@click.group(
    "config", cls=Table, table=_COMMANDS, modules={"init": "mlx_launcher.cli.config_init"}, no_args_is_help=False
)
@json_option
def command() -> None:
    """Show, check or write the configuration file."""


@command.command("show")
@server_options
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@json_option
@click.pass_obj
def show(app: App, /, origin: bool, **server: Any) -> Result:
    """Show the values in force for the backend that would be started. Keys are masked.

    It takes the options of `start`, and shows what they would make of it.
    """
    from mlx_launcher.config.show import rows

    settings = settle(Flags(**server), os.environ, document_in_force(app))
    values = rows(settings)
    width = max(map(len, values))
    lines = []
    for key, row in values.items():
        value = row["value"] if isinstance(row["value"], str) else json.dumps(row["value"], ensure_ascii=False)
        lines.append(clean(f"{key:{width}}  {value}" + (f"  ({row['origin']})" if origin else "")))
    lines += [clean(f"note: {note}") for note in settings.notes]
    return Result(_data(settings, {"values": values, "notes": settings.notes}), lines)


@command.command("validate")
@click.option("--mode", metavar="NAME", help="The backend that is to be started. [default: the file's own]")
@json_option
@click.pass_obj
def validate(app: App, mode: str | None) -> Result:
    """Check the whole file, also what is not used, and list everything that is wrong with it."""
    from mlx_launcher.backends.review import review

    read = document_in_force(app)
    if read.file is None:
        raise _no_file()
    problems = review(Flags(mode=mode), os.environ, read, current_directory())
    errors = [problem for problem in problems if problem.severity == "error"]
    lines = [clean(f"{problem.severity}: {read.file}: {problem.line}") for problem in problems]
    if not problems:
        lines = [f"{read.file}: nothing is wrong."]
    data = {"file": str(read.file), "problems": [problem.as_json(read.file) for problem in problems]}
    error = None
    if errors:
        first, count = errors[0], f"{len(errors)} error{'s'[: len(errors) > 1]}"
        what = f"{read.file}: {count}, the first: {first.place}{first.message}"
        error = LaunchError("config_invalid", what, first.hint, EXIT_CONFIG)
    return Result(data, lines, error)


@command.command("schema")
@json_option
def schema() -> Result:
    """Print the JSON Schema of the configuration file, for editors and other programs."""
    from mlx_launcher.config.schema import json_schema

    found = json_schema()
    return Result(found, [json.dumps(found, indent=2)])


@command.command("path")
@json_option
@click.pass_obj
def path(app: App) -> Result:
    """Print which file is in force; exits with 1 where there is none."""
    file = file_in_force(app)
    if file is None:
        raise _no_file()
    return Result({"file": str(file)}, [str(file)])


def _no_file() -> LaunchError:
    homes = [home] if (home := document.home_directory()) else []
    places = " or ".join(dict.fromkeys([current_directory(), *map(str, homes)]))
    what = f"there is no configuration file: no {', '.join(document.NAMES)} in {places}"
    return LaunchError("no_config", what, "Write one with mlx-launch config init", EXIT_FAILED)


def _data(settings: Settings, more: dict[str, Any]) -> dict[str, Any]:
    file = settings.document.file
    return {"file": str(file) if file else None, "mode": settings.asked.value, "backend": settings.block, **more}
