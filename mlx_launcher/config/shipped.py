"""The files that come with the program: beside the package in a checkout, inside it once installed."""

from pathlib import Path

import mlx_launcher
from mlx_launcher.errors import LaunchError

_PACKAGE = Path(mlx_launcher.__file__).parent


def read_text(folder: str, name: str) -> str:
    """The text of a shipped file, for example `scripts`, `mlx-textgen-server.sh`. LaunchError `incomplete` without it."""
    for root in (_PACKAGE / "share", _PACKAGE.parent):
        try:
            return (root / folder / name).read_text(encoding="utf-8")
        except OSError:
            continue
    raise LaunchError("incomplete", f"this installation lacks {folder}/{name}", "Install mlx-launcher again")
