"""Flags, environment, file and defaults, one over the other, each value with where it came from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.config import defaults, modes, urls
from mlx_launcher.config.document import Document
from mlx_launcher.config.problems import Problem, error, invalid, refuse_errors, warning
from mlx_launcher.errors import EXIT_USAGE, LaunchError

MODE_VARIABLE = "ANYCLAUDE_MODE"
# By key, first found first: anyclaude's own names for its mode `mlx`, before that, and since.
_VARIABLES = {
    "url": ("MLX_URL", "VLLM_MLX_URL", "LOCAL_URL"),
    "model": ("MLX_MODEL", "VLLM_MLX_MODEL", "LOCAL_MODEL"),
    "modelPath": ("MLX_MODEL_PATH",),
    "apiKey": ("MLX_API_KEY", "VLLM_MLX_API_KEY", "LOCAL_API_KEY"),
}
API_KEY_VARIABLE = _VARIABLES["apiKey"][0]
KEY_VARIABLES = _VARIABLES["apiKey"]

# What holds when nobody says otherwise. Durations are seconds, sizes bytes.
DEFAULTS: dict[str, Any] = {
    "model": None,
    "modelPath": None,
    "port": defaults.PORT,
    "host": defaults.HOST,
    "apiKey": None,
    "apiKeyFile": None,
    "requireKey": False,
    "acceptAnyModel": True,
    "maxQueue": defaults.MAX_QUEUE,
    "serverScript": None,
    "command": None,
    "env": {},
    "pythonVenv": "~/.venv-mlx",
    "fallback": modes.LEGACY[0],
    "stopTimeout": defaults.STOP_TIMEOUT_S,
    "hangTimeout": defaults.HANG_TIMEOUT_S,
    "freezeTimeout": defaults.FREEZE_TIMEOUT_S,
    "idleTimeout": defaults.IDLE_TIMEOUT_S,
    "restart.maxRestarts": defaults.MAX_RESTARTS,
    "restart.window": defaults.RESTART_WINDOW_S,
    "restart.backoff": defaults.BACKOFF_S,
    "restart.backoffMax": defaults.BACKOFF_MAX_S,
    "cache.enable_cache": True,
    "cache.cache_slots": defaults.CACHE_SLOTS,
    "cache.min_tokens_for_cache": defaults.CACHE_MIN_TOKENS,
    "cache.dir": None,
    "cache.maxBytes": None,
    "cache.memoryBytes": None,
    "warmup.promptFiles": [],
    "standby": False,
    "memoryLimit": None,
    "metricsPort": None,
    "distributed.enabled": False,
    "distributed.peers": [],
    "distributed.strategy": "auto",
    "distributed.connection": "auto",
    "distributed.hostFile": None,
    "distributed.port": defaults.CLUSTER_PORT,
    "distributed.python": None,
    "distributed.sshOptions": [],
    "discovery.nodes": [],
}
DURATIONS = {
    *("stopTimeout", "hangTimeout", "freezeTimeout", "idleTimeout"),
    *("restart.window", "restart.backoff", "restart.backoffMax"),
}


class Flags(NamedTuple):
    """What the command line says about a server; None where it says nothing. `model` is as the user wrote it."""

    model: str | None = None
    port: int | None = None
    host: str | None = None
    log_file: str | None = None
    mode: str | None = None
    demo: bool = False
    force: bool = False


def names_a_model(flags: Flags, environment: Mapping[str, str]) -> bool:
    """Whether something besides a configuration file says which model to serve."""
    variables = (*_VARIABLES["model"], *_VARIABLES["modelPath"])
    return flags.demo or flags.model is not None or any(environment.get(name) for name in variables)


class Value(NamedTuple):
    value: Any
    origin: str  # "flag --port", "environment MLX_MODEL", "FILE backends.mlx.port", "default"


class Settings:
    """What is in force for one backend. `settings["cache.cache_slots"]` is a value, `origin(key)` where it came from."""

    def __init__(self, asked: Value, block: str, document: Document, values: dict[str, Value]) -> None:
        self.asked = asked  # the mode as it was asked for
        self.block = block  # the name of the block that it means
        self.document = document
        self.values = values
        self.notes: list[str] = []

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    def origin(self, key: str) -> str:
        return self.values[key].origin

    def from_file(self, key: str) -> bool:
        return bool(self.document.file) and self.origin(key).startswith(str(self.document.file))

    def model_key(self, cwd: str) -> str | None:
        """The key whose value says which model is served: `modelPath`, or `model` where that is a path or org/name.

        A path in the environment's model is newer than the file's modelPath; org/name there may be no more than a name.
        """
        model: str = self["model"] or ""
        newer = self.origin("model").startswith("environment") and (
            self.from_file("modelPath") or not self["modelPath"]
        )
        if newer and model.startswith(("/", "~", ".")):
            return "model"
        if self["modelPath"]:
            return "modelPath"
        # Not Path.is_dir, which raises for a name that is too long for a file.
        is_directory = model and os.path.isdir(self.base("model", cwd) / model)  # noqa: PTH112
        return "model" if "/" in model or is_directory else None

    def base(self, key: str, cwd: str) -> Path:
        """Where a relative path in a value starts: the file's directory, or where the command runs."""
        return self.document.base if self.from_file(key) else Path(cwd)

    def path(self, key: str, cwd: str) -> Path:
        """The path that a value is, without ~ and, of a file's directory or of an absolute `cwd`, absolute."""
        # Not Path.expanduser, which raises for a name that begins with ~ and is no user's.
        return Path(os.path.normpath(self.base(key, cwd) / os.path.expanduser(self[key])))  # noqa: PTH111


def settle(flags: Flags, environment: Mapping[str, str], document: Document) -> Settings:
    """What is in force for the backend that flags, environment and file mean.

    LaunchError: `unknown_mode`, `ambiguous_mode` and `config_invalid` (exit 4) for what cannot be used, `usage` (exit 2) for
    a flag, `nothing_to_start` (exit 1) for a mode that needs no server. What is wrong elsewhere in the file becomes a note.
    """
    asked, block = _mode(flags, environment, document)
    values = {key: Value(default, "default") for key, default in DEFAULTS.items()}
    settings = Settings(asked, block, document, values)
    if document.file is not None:
        _lay_file(settings)
    _lay_environment(settings, environment)
    _lay_flags(settings, flags)
    if block in modes.LOCAL and not settings["modelPath"]:
        raise modes.why_not(block)
    return settings


def settle_fallback(settings: Settings) -> Settings:
    """The fallback's own block over the defaults; what clients see (port, host, model, key) stays the configured backend's.

    A block that nobody named as the fallback is left aside, with a note, where it is wrong.
    """
    origin = settings.origin("fallback")
    name: str = settings["fallback"]
    block = modes.find_block(name, _blocks(settings.document))
    values = {key: Value(default, "default") for key, default in DEFAULTS.items()}
    fallback = Settings(Value(name, origin), block, settings.document, values)
    if settings.document.file is not None:
        try:
            _lay_file(fallback)
        except LaunchError as failure:
            if origin != "default":
                raise
            settings.notes.append(f"the fallback's block is not used: {failure.message}")
    seen = ("model", "modelPath", "port", "host", "apiKey", "apiKeyFile", "requireKey", "acceptAnyModel")
    for key in (*seen, "pythonVenv"):
        values[key] = settings.values[key]
    return fallback


def _blocks(document: Document) -> Mapping[str, Any]:
    blocks = document.data.get("backends")
    return blocks if isinstance(blocks, dict) else {}


def _mode(flags: Flags, environment: Mapping[str, str], document: Document) -> tuple[Value, str]:
    blocks = _blocks(document)
    if flags.mode:
        asked = Value(flags.mode, "flag --mode")
    elif environment.get(MODE_VARIABLE):
        asked = Value(environment[MODE_VARIABLE], f"environment {MODE_VARIABLE}")
    elif document.data.get("backend"):
        asked = Value(document.data["backend"], f"{document.file} backend")
        if not isinstance(asked.value, str):
            raise invalid(document.name, error(("backend",), "a backend's name is wanted", "Or leave it out"))
    elif only := modes.only_enabled(blocks):
        asked = Value(only, f"{document.file}, its only MLX backend that is enabled")
    else:
        asked = Value(modes.DEFAULT, "default")
    block = modes.find_block(asked.value, blocks)
    not_here = block in modes.NOT_SERVED or _is_lm_studios(block, blocks)
    if not_here and not flags.mode and (flags.demo or flags.model is not None):
        # anyclaude's setting is about anyclaude; who names a model here wants it served.
        block = modes.only_enabled(blocks) or modes.DEFAULT
        asked = Value(block, f"default, as {asked.origin} names one that is not started here")
    if block in modes.NOT_SERVED:
        raise modes.why_not(block)
    return asked, block


def _is_lm_studios(block: str, blocks: Mapping[str, Any]) -> bool:
    raw = blocks.get(block)
    return block in modes.LOCAL and not (isinstance(raw, dict) and raw.get("modelPath"))


def _lay_file(settings: Settings) -> None:
    from mlx_launcher.config import check

    document, block = settings.document, settings.block
    checked = check.check_block(document, block)
    top = check.check_top(document)
    path = ("backends", block)
    ours = [problem for problem in document.problems if problem.path[: len(path)] == path]
    beside = [problem for problem in document.problems if problem.path[: len(path)] != path]
    problems = [*ours, *checked.problems, *check.fallback_problems(document, block)]
    problems += [problem for problem in top.problems if problem.path in (("backends",), ("pythonVenv",))]
    refuse_errors(document.name, problems)
    others = [problem for problem in top.problems if problem not in problems]
    settings.notes += [f"{document.name}: {problem.line}" for problem in _as_warnings([*problems, *beside, *others])]
    if (venv := top.values.get("pythonVenv")) is not None:
        settings.values["pythonVenv"] = Value(venv, f"{document.file} pythonVenv")
    url = checked.values.get("baseUrl")
    if url is not None:
        port = urls.port_here(url, checked.values.get("host"))
        settings.values["port"] = Value(port, f"{document.file} {'.'.join(path)}.baseUrl")
    for key, value in checked.values.items():
        if key in DEFAULTS:
            settings.values[key] = Value(value, f"{document.file} {'.'.join(path)}.{key}")
    if check.refuses_fallback(document, block):
        settings.values["fallback"] = Value(None, f"{document.file} {'.'.join(path)}.fallback")


def _as_warnings(problems: list[Problem]) -> list[Problem]:
    """Each once, without the severity: what is wrong with what is not used bars no start."""
    return list(dict.fromkeys(warning(*problem[1:]) for problem in problems))


def _lay_environment(settings: Settings, environment: Mapping[str, str]) -> None:
    for key, names in _VARIABLES.items():
        if settings.block in modes.LOCAL:
            names = tuple(reversed(names))
        name = next((name for name in names if environment.get(name)), None)
        if name is None:
            continue
        origin = f"environment {name}"
        if key == "url":
            try:
                port = urls.port_here(environment[name], settings["host"])
            except ValueError as reason:
                raise invalid(origin, error((), str(reason), f"Change or unset {name}")) from None
            settings.values["port"] = Value(port, origin)
        else:
            settings.values[key] = Value(environment[name], origin)


def _lay_flags(settings: Settings, flags: Flags) -> None:
    if flags.port is not None:
        settings.values["port"] = Value(flags.port, "flag --port")
    if flags.host is not None:
        try:
            urls.address(flags.host)
        except ValueError as reason:
            hint = "127.0.0.1 or 0.0.0.0, for example"
            raise LaunchError("usage", f"--host: {reason}", hint, EXIT_USAGE) from None
        settings.values["host"] = Value(flags.host, "flag --host")
    if flags.model is not None:
        settings.values["modelPath"] = Value(flags.model, "flag --model")
    elif flags.demo:
        settings.values["modelPath"] = Value("demo", "flag --demo")
