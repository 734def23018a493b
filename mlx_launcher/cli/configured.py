"""The configuration file that a command works with."""

import os
from pathlib import Path

from mlx_launcher.cli.output import App
from mlx_launcher.config import document
from mlx_launcher.errors import LaunchError


def document_in_force(app: App) -> document.Document:
    """The file that --config names, else the one that is found, read; an empty one where there is none.

    LaunchError `config_invalid` (exit 4) when it cannot be read.
    """
    file = file_in_force(app)
    return document.read(file) if file else document.nothing(current_directory())


def file_in_force(app: App) -> Path | None:
    if app.no_config:
        return None
    return document.find(app.config, os.environ, current_directory(), document.home_directory())


def current_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        raise LaunchError("no_directory", "the current directory is gone", "Change to another one first") from None
