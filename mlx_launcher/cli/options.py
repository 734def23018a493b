"""Options that more than one command takes."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mlx_launcher.config import defaults

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """`--json` after the command. Its value is read before parsing (App.json); here it is only allowed and explained."""
    return click.option("--json", is_flag=True, expose_value=False, help="Write one JSON object to stdout.")(command)


def which_option(command: F) -> F:
    """`--port` of a command that looks for an instance."""
    text = "The server on this port, when more than one runs."
    return click.option("--port", type=_PORT, metavar="N", help=text)(command)


def server_options(command: F) -> F:
    """The options that describe a server, the same for `start` and `run`."""
    for option in reversed(_SERVER):
        command = option(command)
    return command


_PORT = click.IntRange(1, 65535)
_SERVER = (
    click.option("--model", metavar="DIR", help="The directory of an MLX model."),
    click.option("--demo", is_flag=True, help="Serve a tiny model that is built on the spot, without a download."),
    click.option(
        "--port", type=_PORT, metavar="N", default=defaults.PORT, show_default=True, help="The port to listen on."
    ),
    click.option(
        "--host",
        metavar="ADDRESS",
        default=defaults.HOST,
        show_default=True,
        help="The address to listen on. One that others can reach needs a key in MLX_API_KEY.",
    ),
)
