"""Options that more than one command takes."""

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mlx_launcher.config import defaults

F = TypeVar("F", bound=Callable[..., Any])


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "whole number"


class Number(click.FloatRange):
    """A number in a range, and no `nan`, which lies in any."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a valid number.", param, ctx)
        return number


# What the supervisor takes.
SECONDS = Number(min=0, max=1e9, max_open=True)


def expanded(_: click.Context, __: click.Parameter, path: str | None) -> str | None:
    """For a path's `callback`: no shell expands the ~ of `--option=~/file`."""
    return path if path is None else os.path.expanduser(path)  # noqa: PTH111


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


def model_options(command: F) -> F:
    """Those of them that say what is served, and not where."""
    for option in reversed([*_WHAT, _FORCE]):
        command = option(command)
    return command


def port_option(command: F) -> F:
    """`--port` of a command that names a server's port and nothing else of it."""
    return click.option("--port", type=_PORT, metavar="N", help=f"The port. [default: {defaults.PORT}]")(command)


def log_file_option(command: F) -> F:
    """`--log-file` of a server that somebody else keeps the log of."""
    text = "Where the server's log goes. [default: server.log beside the state]"
    return click.option("--log-file", metavar="FILE", callback=expanded, help=text)(command)


_PORT = Whole(1, 65535)
_WHAT = (
    click.option("--mode", metavar="NAME", help="The backend of the configuration file to start. [default: its own]"),
    click.option("--model", metavar="DIR", help="The directory of an MLX model, or org/name on the hub."),
    click.option("--demo", is_flag=True, help="Serve a tiny model that is built on the spot, without a download."),
)
_FORCE = click.option("--force", is_flag=True, help="Start a model that does not fit into this machine's memory.")
_SERVER = (
    *_WHAT,
    click.option("--port", type=_PORT, metavar="N", help=f"The port to listen on. [default: {defaults.PORT}]"),
    click.option(
        "--host",
        metavar="ADDRESS",
        help="The address to listen on. One that others can reach needs a key in MLX_API_KEY. "
        f"[default: {defaults.HOST}]",
    ),
    _FORCE,
)
