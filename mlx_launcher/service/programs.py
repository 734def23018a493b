"""The effects of a service's commands and files, and which manager this machine has."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.service.launchd import Launchd
from mlx_launcher.service.manager import Manager
from mlx_launcher.service.systemd import Systemd

# How mlx-launch is run, by this interpreter. -P: the directory that it starts in may hold a json.py of its own.
PROGRAM = (sys.executable, "-P", "-m", "mlx_launcher")


class Done(NamedTuple):
    code: int
    output: str
    error: str


def manager(environment: Mapping[str, str]) -> Manager:
    return Launchd(environment, os.getuid()) if sys.platform == "darwin" else Systemd(environment)


def run(argv: list[str], timeout_s: float) -> Done:
    """What a program says. Raises nothing: one that is missing or too slow has failed with 127 or 124, as in a shell."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return Done(124, "", f"{argv[0]} did not end in {timeout_s:g} s")
    except OSError as error:
        return Done(127, "", f"{argv[0]}: {error.strerror or error}")
    return Done(done.returncode, done.stdout, done.stderr.strip())


def write(file: Path, text: str) -> None:
    """The whole file or nothing of it, for its owner alone; directories that are missing are made. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, fresh = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(descriptor)
        os.replace(fresh, file)  # noqa: PTH105
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def read(file: Path) -> str | None:
    """None where there is none, or none that can be read."""
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
