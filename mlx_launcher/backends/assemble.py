"""Flags and environment into a plan: everything the supervisor needs, nothing that it has to look up."""

import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.backends.models import check_model
from mlx_launcher.backends.textgen import textgen
from mlx_launcher.config import defaults
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.plan import Model, Plan, Source

API_KEY_VARIABLE = "MLX_API_KEY"


class Flags(NamedTuple):
    """What the command line says about a server. `model` is a directory as the user wrote it; None means the demo."""

    model: str | None
    port: int = defaults.PORT
    host: str = defaults.HOST
    log_file: str | None = None


class Caller(NamedTuple):
    """The command that makes the plan, recorded so that the same plan can be made again."""

    argv: Sequence[str]
    cwd: str
    environment: Mapping[str, str]


def demo_directory(state_dir: Path) -> Path:
    return state_dir / "models" / "demo"


def assemble(flags: Flags, state_dir: Path, caller: Caller) -> Plan:
    """The plan for one server on `flags.port`.

    LaunchError: `model_not_found` and `model_incomplete` for the model, `key_required` for an address that others can
    reach without a key to ask them for, `usage` for one that is no address. The demo model must have been built.
    """
    model = _model(flags.model, state_dir, caller.cwd)
    hosts, local = _hosts(flags.host)
    api_key = caller.environment.get(API_KEY_VARIABLE) or None
    if not local and api_key is None:
        raise LaunchError(
            "key_required",
            f"{flags.host} can be reached by others, and no API key is set",
            f"Set one in the environment variable {API_KEY_VARIABLE}, or leave --host out",
        )
    instance = state_dir / str(flags.port)
    log_file = Path(caller.cwd, flags.log_file) if flags.log_file else instance / "server.log"
    source: Source = {"argv": list(caller.argv), "cwd": caller.cwd, "env": dict(caller.environment)}
    return {
        "schema": 1,
        "instance": os.fspath(instance),
        "hosts": hosts,
        "port": flags.port,
        "url": _url(hosts[0], flags.port),
        "model": model,
        "backend": textgen("mlx", model, instance, api_key, require_key=not local),
        "fallback": None,
        "stop_timeout_s": defaults.STOP_TIMEOUT_S,
        "hang_timeout_s": defaults.HANG_TIMEOUT_S,
        "freeze_timeout_s": defaults.FREEZE_TIMEOUT_S,
        "idle_timeout_s": defaults.IDLE_TIMEOUT_S,
        "restart": {
            "max_restarts": defaults.MAX_RESTARTS,
            "window_s": defaults.RESTART_WINDOW_S,
            "backoff_s": defaults.BACKOFF_S,
            "backoff_max_s": defaults.BACKOFF_MAX_S,
        },
        "log_file": os.fspath(log_file),
        "log_max_bytes": defaults.LOG_MAX_BYTES,
        "source": source,
    }


def _model(given: str | None, state_dir: Path, cwd: str) -> Model:
    if given is None:
        model: Model = {"id": "demo", "path": os.fspath(demo_directory(state_dir))}
    else:
        # Not Path.expanduser, which raises for a name that begins with ~ and is no user's.
        path = os.path.normpath(Path(cwd, os.path.expanduser(given)))  # noqa: PTH111
        model = {"id": given, "path": path}
    check_model(Path(model["path"]))
    return model


def _hosts(given: str) -> tuple[list[str], bool]:
    """The addresses to bind, and whether only this machine can reach them."""
    if given in (defaults.HOST, "localhost"):
        return list(defaults.LOOPBACK), True
    try:
        return [given], ipaddress.ip_address(given).is_loopback
    except ValueError:
        raise LaunchError(
            "usage", f"--host takes an address, not {given!r}", "127.0.0.1 or 0.0.0.0, for example", EXIT_USAGE
        ) from None


def _url(host: str, port: int) -> str:
    """What clients on this machine use: a wildcard is no address to connect to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
