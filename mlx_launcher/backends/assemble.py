"""Flags, environment and file into a plan: everything the supervisor needs, nothing that it has to look up."""

import os
from pathlib import Path

from mlx_launcher.backends.cluster import cluster
from mlx_launcher.backends.command import command, needs_model
from mlx_launcher.backends.legacy import legacy
from mlx_launcher.backends.models import (
    Found,
    Say,
    check_model,
    demo_directory,
    find_model,
    no_model,
    require_model,
    served_names,
)
from mlx_launcher.backends.script import script
from mlx_launcher.backends.serving import Caller, Serving
from mlx_launcher.backends.textgen import textgen
from mlx_launcher.backends.which import BUILT_IN, Kind, which
from mlx_launcher.config import defaults, urls
from mlx_launcher.config.document import Document, nothing
from mlx_launcher.config.keyfile import read_key
from mlx_launcher.config.layers import API_KEY_VARIABLE, Flags, Settings, settle, settle_fallback
from mlx_launcher.config.problems import error, invalid
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Backend, Plan, Source

__all__ = ["Caller", "Flags", "assemble", "refuse_beforehand"]


def assemble(
    flags: Flags, state_dir: Path, caller: Caller, document: Document | None = None, say: Say = lambda *_: None
) -> Plan:
    """The plan for one server. The demo model must have been built; one from the hub is downloaded, and `say` told of it.

    LaunchError: what `settle` raises for the configuration, `model_…` for the model, `no_model` when nothing names one,
    `key_required` for an address that others can reach without a key to ask them for, `key_file` for a key's file that is
    not for us alone.
    """
    settings = settle(flags, caller.environment, document or nothing(caller.cwd))
    kind = which(settings, caller.cwd)
    hosts, local = urls.address(settings["host"])
    key = _key(settings, caller.cwd)
    _require_key(settings, key, local)
    found = find_model(settings, state_dir, caller, kind.name not in BUILT_IN, say)
    if found is None:
        if kind.name != "command" or needs_model(settings):
            raise no_model(settings)
        found = Found({"id": settings["model"] or settings.block, "path": ""}, [settings["model"] or settings.block])
    elif kind.name in BUILT_IN:
        # What a machine of a cluster has to hold is a part of it.
        _check(Path(found.model["path"]), flags.force or kind.name == "cluster")
    instance = state_dir / str(settings["port"])
    serving = Serving(
        model=found.model,
        names=served_names(found.given, found.model["path"]),
        instance=instance,
        host=hosts[0],
        port=settings["port"],
        url=urls.client_url(hosts[0], settings["port"]),
        api_key=key,
        require_key=settings["requireKey"] or not local,
    )
    log_file = Path(caller.cwd, flags.log_file) if flags.log_file else instance / "server.log"
    source: Source = {"argv": list(caller.argv), "cwd": caller.cwd, "env": dict(caller.environment)}
    backend = _backend(kind, serving, settings, caller)
    fallback = _fallback(kind, serving, settings, caller)
    if kind.name == "textgen" and fallback is None:
        _refuse_unserved(found.model["path"])
    return {
        "schema": 1,
        "instance": os.fspath(instance),
        "hosts": hosts,
        "port": settings["port"],
        "url": serving.url,
        "model": found.model,
        "backend": backend,
        "fallback": fallback,
        "stop_timeout_s": settings["stopTimeout"],
        "hang_timeout_s": settings["hangTimeout"],
        "freeze_timeout_s": settings["freezeTimeout"],
        "idle_timeout_s": settings["idleTimeout"],
        "standby": settings["standby"],
        "memory_limit_bytes": settings["memoryLimit"],
        "metrics_port": _metrics_port(settings),
        "restart": {
            "max_restarts": settings["restart.maxRestarts"],
            "window_s": settings["restart.window"],
            "backoff_s": settings["restart.backoff"],
            "backoff_max_s": settings["restart.backoffMax"],
        },
        "log_file": os.fspath(log_file),
        "log_max_bytes": defaults.LOG_MAX_BYTES,
        "source": source,
        "notes": [*settings.notes, *_without_effect(settings, backend)],
    }


def refuse_beforehand(flags: Flags, state_dir: Path, caller: Caller, document: Document) -> None:
    """LaunchError as `assemble`, for as much as can be told without a download and without building the demo model."""
    settings = settle(flags, caller.environment, document)
    kind = which(settings, caller.cwd)
    _require_key(settings, _key(settings, caller.cwd), urls.address(settings["host"])[1])
    if flags.demo and not demo_directory(state_dir).exists():
        return
    try:
        if not flags.demo:
            require_model(settings, caller.cwd, caller.environment, kind.name not in BUILT_IN)
    except LaunchError as error:
        if error.code != "model_absent":
            raise
    else:
        assemble(flags, state_dir, caller, document)


def _without_effect(settings: Settings, backend: Backend) -> list[str]:
    """What is set and cannot be had of a server that binds the port itself: nobody knows what it has in flight."""
    if backend["kind"] == "host":
        return []
    asked = [name for name in ("idleTimeout", "standby") if settings[name]]
    return [f"{name} has no effect on a server of your own (command or serverScript)" for name in asked]


def _metrics_port(settings: Settings) -> int | None:
    port: int | None = settings["metricsPort"]
    if port is not None and port == settings["port"]:
        problem = error((), f"{port} is the port of the server itself", "Choose another one, or leave it out")
        raise invalid(settings.origin("metricsPort"), problem)
    return port


def _key(settings: Settings, cwd: str) -> str | None:
    """The key in force: the environment's or the file's own, else what the file's `apiKeyFile` holds."""
    if key := settings["apiKey"]:
        if not key.isprintable():
            problem = error((), "the key has a newline or another sign in it that no request can carry", "Correct it")
            raise invalid(settings.origin("apiKey"), problem)
        return str(key)
    if not settings["apiKeyFile"]:
        return None
    file = os.path.expanduser(settings["apiKeyFile"])  # noqa: PTH111
    return read_key(settings.base("apiKeyFile", cwd) / file)


def _require_key(settings: Settings, key: str | None, local: bool) -> None:
    if key or (local and not settings["requireKey"]):
        return
    why = f"{settings['host']} can be reached by others" if not local else "requireKey is set"
    where = f"environment variable {API_KEY_VARIABLE}" + (
        " or as apiKey or apiKeyFile" if settings.document.file else ""
    )
    otherwise = "leave --host out" if settings.origin("host") == "flag --host" else "change that"
    raise LaunchError("key_required", f"{why}, and no API key is set", f"Set one in the {where}, or {otherwise}")


def _check(path: Path, force: bool) -> None:
    """Whole, of a kind that mlx-lm knows, and not larger than this machine."""
    check_model(path)
    from mlx_launcher.models import facts, fit

    facts.refuse_unknown(facts.facts(path))
    fit.check(path, force)


def _refuse_unserved(path: str) -> None:
    """What mlx-textgen cannot serve is for its host to say where a fallback can take over, and for the command where none can."""
    from mlx_launcher.models import facts

    facts.refuse_unserved(facts.facts(Path(path)))


def _backend(kind: Kind, serving: Serving, settings: Settings, caller: Caller) -> Backend:
    if kind.name == "command":
        return command(serving, settings, caller.cwd, caller.environment)
    if kind.script is not None:
        return script(serving, settings, kind.script, caller.cwd)
    if kind.name == "cluster":
        return cluster(serving, settings, caller.cwd)
    return legacy(serving, settings) if kind.name == "legacy" else textgen(serving, settings)


def _fallback(kind: Kind, serving: Serving, settings: Settings, caller: Caller) -> Backend | None:
    """The fallback on the configured backend's port, model and names; None where there is to be none.

    By default it is the built-in legacy server, for all backends but itself and those whose model only they can load.
    """
    if not settings["fallback"]:
        return None
    if settings.origin("fallback") != "default":
        own = settle_fallback(settings)
        return _backend(which(own, caller.cwd), serving, own, caller)
    if kind.name == "legacy" or (kind.name not in BUILT_IN and not _is_whole(serving.model["path"])):
        return None
    if kind.name == "cluster" and (larger := _too_large(serving.model["path"])):
        settings.notes.append(f"there is no fallback: {larger}")
        return None
    # Its block may name a script or a command; what takes over unasked is the server that borrows the socket.
    return legacy(serving, settle_fallback(settings))


def _too_large(path: str) -> str | None:
    """Why this machine alone cannot hold a model; None where it can."""
    from mlx_launcher.models import fit

    try:
        fit.check(Path(path), force=False)
    except LaunchError as error:
        return error.message
    return None


def _is_whole(path: str) -> bool:
    from mlx_launcher.models.directory import BrokenModelError
    from mlx_launcher.models.facts import facts

    try:
        return bool(path) and facts(Path(path)).known
    except (BrokenModelError, OSError):
        return False
