"""Any program as a server: an argument list with placeholders, run without a shell."""

import os
import re
import shlex
import shutil
from collections.abc import Mapping

from mlx_launcher.backends.serving import Serving
from mlx_launcher.config.layers import Settings
from mlx_launcher.config.problems import error, invalid
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Backend

_PLACEHOLDER = re.compile(r"\{(model|port|host|url|state_dir)\}")


def needs_model(settings: Settings) -> bool:
    words = settings["command"]
    return "{model}" in (words if isinstance(words, str) else "\0".join(words))


def command(serving: Serving, settings: Settings, cwd: str, environment: Mapping[str, str]) -> Backend:
    """The block's `command` with {model} {port} {host} {url} {state_dir} filled in; a text is split as a shell would.

    The model is an absolute path, so it is never taken for an option. LaunchError `config_invalid` for a command that
    cannot be split, is empty or names a program that is not there.
    """
    values = {
        "model": serving.model["path"],
        "port": str(serving.port),
        "host": serving.host,
        "url": serving.url,
        "state_dir": os.fspath(serving.instance),
    }
    # Split first, fill in then: what is filled in may hold spaces, quotes and braces.
    argv = [_PLACEHOLDER.sub(lambda found: values[found[1]], word) for word in _words(settings)]
    directory = os.fspath(settings.base("command", cwd))
    search = settings["env"].get("PATH") or environment.get("PATH")
    program = os.path.expanduser(argv[0]) if argv else ""  # noqa: PTH111
    if "/" in program:
        program = os.path.normpath(os.path.join(directory, program))  # noqa: PTH118
    found = shutil.which(program, path=search) if program else None
    if found is None:
        what = f"there is no program {program} that can be run" if program else "it names no program"
        raise _wrong(settings, what, "Name a program that is on the PATH, or its path")
    return {
        "name": settings.block,
        "kind": "command",
        "argv": [os.path.abspath(found), *argv[1:]],  # noqa: PTH100
        "env": {"PYTHONUNBUFFERED": "1", **settings["env"]},
        "cwd": directory,
        "settings": serving.probe(),
    }


def _words(settings: Settings) -> list[str]:
    written = settings["command"]
    if isinstance(written, list):
        return written
    try:
        return shlex.split(written)
    except ValueError as failure:
        raise _wrong(settings, f"it cannot be split: {failure}", "Close the quotes, or give a list") from None


def _wrong(settings: Settings, what: str, hint: str) -> LaunchError:
    return invalid(settings.document.name, error(("backends", settings.block, "command"), what, hint))
