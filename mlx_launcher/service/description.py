"""What a service manager is to run, in words that are true of every one of them. Pure."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.config.layers import Settings
from mlx_launcher.errors import LaunchError

# What is found and started depends on these besides PATH; none of them holds a secret. Where models lie, and where
# temporary files go.
_PLACES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")
# Between the last signal of a stop and the end: what is left is looked for, the state is written.
_STOP_GRACE_S = 15
# The open files that a server is given: one for each connection, and what MLX maps.
OPEN_FILES = 4096
# A service that dies is started again after this; five times in five minutes is enough.
RESTART_S = 10
RESTARTS = 5
RESTART_WINDOW_S = 300


class Service(NamedTuple):
    """One service, for one port. `command` is what is run, its first word absolute, `run --service` among the others.

    A stop may take `stop_s` seconds. `key_file` may hold what must not be in a unit, as NAME=VALUE lines; "" where the
    manager cannot read one.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    directory: str
    stop_s: int
    key_file: str

    @property
    def port(self) -> int:
        """Always among the options, so that a name stands for one port."""
        return int(self._option("port") or 0)

    @property
    def state_dir(self) -> str:
        return self._option("state-dir") or ""

    @property
    def log(self) -> str:
        """What it prints, where the manager keeps no log itself. The server's own log is beside the state, as ever."""
        return os.path.join(self.state_dir, f"service-{self.port}.log")  # noqa: PTH118 - text in, text out

    @property
    def but_for_its_port(self) -> tuple[str, ...]:
        return tuple(word for word in self.command if not word.startswith("--port="))

    def install_words(self) -> list[str]:
        """The command that installs it again, after the program's own name."""
        at = self.command.index("run")
        outer = [word for word in self.command[:at] if word.startswith(("--config=", "--state-dir=", "--no-config"))]
        return [*outer, "service", "install", *(word for word in self.command[at + 1 :] if word != "--service")]

    def _option(self, name: str) -> str | None:
        start = f"--{name}="
        return next((word.removeprefix(start) for word in self.command if word.startswith(start)), None)


def describe(
    program: Sequence[str],
    options: Sequence[str],
    settings: Settings,
    environment: Mapping[str, str],
    cwd: str,
    state_dir: Path,
    key_file: str,
) -> Service:
    """The service for these settings. `program` is how mlx-launch is run, `options` those of `run` but the port.

    It runs at home and not in `cwd`, which may be gone at the next login: what is relative to that is made absolute.
    LaunchError `key_in_environment` when the key is known to this shell alone.
    """
    _refuse_key(settings, environment, key_file)
    document = settings.document
    source = f"--config={document.file}" if document.file else "--no-config"
    command = [*program, f"--state-dir={state_dir}", source, "run", "--service", f"--port={settings['port']}", *options]
    home = environment.get("HOME") or str(Path("~").expanduser())
    kept = {"HOME": home, "PATH": environment.get("PATH") or os.defpath}
    kept.update((name, environment[name]) for name in _PLACES if environment.get(name))
    for key in ("model", "modelPath"):
        if name := _variable(settings, key):
            kept[name] = absolute(settings[key], cwd)
    return Service(tuple(command), kept, home, 2 * math.ceil(settings["stopTimeout"]) + _STOP_GRACE_S, key_file)


def absolute(model: str, cwd: str) -> str:
    """A model's directory that is named from `cwd`, as it is named from anywhere; a name on the hub stays as it is."""
    path = Path(cwd, os.path.expanduser(model))  # noqa: PTH111 - Path.expanduser raises for a name that is no user's
    return os.path.normpath(path) if path.is_dir() else model


def _variable(settings: Settings, key: str) -> str | None:
    """The environment variable that a value comes from."""
    kind, _, name = settings.origin(key).partition(" ")
    return name if kind == "environment" else None


def _refuse_key(settings: Settings, environment: Mapping[str, str], key_file: str) -> None:
    name = _variable(settings, "apiKey")
    if name is None or (key_file and _holds(Path(key_file), name)):
        return
    file = settings.document.file or "~/.anyclauderc.json"
    hint = f"Write it as apiKey into {file} (chmod 600), then unset {name}"
    if key_file:
        hint += f"; or keep {name}=... in {key_file} (chmod 600), which the service reads"
    what = f"the API key comes from {name}, and a service has nothing of this shell: no key is ever written into a unit"
    raise LaunchError("key_in_environment", what, hint)


def _holds(file: Path, name: str) -> bool:
    """Whether the file sets a variable, and is nobody else's to read. LaunchError `key_file` when others may read it."""
    try:
        there = any(line.strip().startswith(f"{name}=") for line in file.read_text(errors="replace").splitlines())
        mode = file.stat().st_mode
    except OSError:
        return False
    if there and mode & 0o077:
        what = f"{file} holds a key, and others may read it (mode {mode & 0o777:04o})"
        raise LaunchError("key_file", what, f"chmod 600 {file}")
    return there
