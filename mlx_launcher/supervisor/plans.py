"""Plans as the supervisor gets them: whole or refused, and told apart without giving away a secret."""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH118

import json
import os
from collections.abc import Iterator
from typing import Any

from mlx_launcher.plan import Backend, Plan
from mlx_launcher.supervisor.rules import Rules

SCHEMA = 1
KINDS = ("host", "script", "command")

_NUMBER = (int, float)
_WORDS = [str]
_BACKEND = {"name": str, "kind": str, "argv": _WORDS, "env": dict, "cwd": (str, type(None)), "settings": dict}
_SHAPE: dict[str, Any] = {
    "schema": int,
    "instance": str,
    "hosts": _WORDS,
    "port": int,
    "url": str,
    "model": {"id": str, "path": str},
    "backend": _BACKEND,
    "stop_timeout_s": _NUMBER,
    "hang_timeout_s": _NUMBER,
    "freeze_timeout_s": _NUMBER,
    "idle_timeout_s": _NUMBER,
    "standby": bool,
    "memory_limit_bytes": (int, type(None)),
    "metrics_port": (int, type(None)),
    "restart": {"max_restarts": int, "window_s": _NUMBER, "backoff_s": _NUMBER, "backoff_max_s": _NUMBER},
    "log_file": str,
    "log_max_bytes": int,
    "source": {"argv": _WORDS, "cwd": str, "env": dict},
}
# Neither describes a server: what is said once at a start, and how the plan was made.
_BESIDE = ("notes", "source")
# What may hold a key anywhere inside: only that it changed is told.
_CLOSED = ("env", "source", "argv")
_SECRET = ("key", "token", "secret", "password")
_VALUE_CHARS = 80


def check(value: Any) -> Plan:
    """The value as a plan. ValueError, naming the key, where something that the supervisor relies on is missing or wrong."""
    _require(value, _SHAPE, "plan")
    plan: Plan = value
    if plan["schema"] != SCHEMA:
        raise ValueError(f"plan.schema is {plan['schema']}, not {SCHEMA}")
    _check_backend(plan["backend"], "plan.backend")
    if plan.get("fallback") is not None:
        _require(plan["fallback"], _BACKEND, "plan.fallback")
        _check_backend(backend(plan, True), "plan.fallback")
    return plan


def _check_backend(backend: Backend, path: str) -> None:
    if backend["kind"] not in KINDS:
        raise ValueError(f"{path}.kind is {backend['kind']!r}")
    if not backend["argv"]:
        raise ValueError(f"{path}.argv is empty")


def _require(value: Any, shape: Any, path: str) -> None:
    kind = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} is {type(value).__name__}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{path}.{key} is missing")
            _require(value[key], inner, f"{path}.{key}")
    elif isinstance(shape, list):
        for item in value:
            _require(item, shape[0], path)


def rules(plan: Plan) -> Rules:
    restart = plan["restart"]
    return Rules(
        restart["max_restarts"],
        restart["window_s"],
        restart["backoff_s"],
        restart["backoff_max_s"],
        plan["stop_timeout_s"],
        plan["hang_timeout_s"],
        plan["freeze_timeout_s"],
        plan["memory_limit_bytes"],
        plan.get("fallback") is not None,
        plan["idle_timeout_s"],
    )


def backend(plan: Plan, on_fallback: bool) -> Backend:
    """The one of a plan's two backends that runs."""
    return plan["fallback"] if on_fallback and plan["fallback"] else plan["backend"]


def names(plan: Plan) -> tuple[str, str | None]:
    """How the configured backend and the fallback are called."""
    fallback = plan.get("fallback")
    return plan["backend"]["name"], fallback["name"] if fallback else None


def config_file(plan: Plan) -> str | None:
    """The configuration that the plan was made of, absolute; None where there was none."""
    source, option = plan["source"], "--config="
    files = [word.removeprefix(option) for word in source["argv"] if word.startswith(option)]
    return os.path.join(source["cwd"], files[-1]) if files else None


def lends(backend: Backend) -> bool:
    """Whether the server binds the port itself."""
    return backend["kind"] != "host"


def notes(plan: Plan) -> list[str]:
    """What is worth saying once when the plan comes into force."""
    found: Any = plan.get("notes")
    return [str(text) for text in found] if isinstance(found, list) else []


def same_server(old: Plan, new: Plan) -> bool:
    """Whether both describe the very same server."""
    return _described(old) == _described(new)


def _described(plan: Plan) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key not in _BESIDE}


def changes(old: Plan, new: Plan) -> list[str]:
    """What differs, a line for each key in the names of the configuration: `stopTimeout 30 → 10`. Secrets are not shown."""
    return list(_differences("", {**old, "notes": None}, {**new, "notes": None}))


def _differences(path: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        was, is_ = old.get(key), new.get(key)
        if was == is_:
            continue
        name = path + _configured_name(key)
        if isinstance(was, dict) and isinstance(is_, dict) and key not in _CLOSED:
            yield from _differences(path if key == "settings" else f"{name}.", was, is_)
        elif key in _CLOSED or _is_secret(key, was) or _is_secret(key, is_):
            yield f"{name} changed"
        else:
            yield f"{name} {_value(was)} → {_value(is_)}"


def _is_secret(key: str, value: Any) -> bool:
    if isinstance(value, dict):  # came or went as a whole, with whatever is in it
        return True
    return value is not None and not isinstance(value, bool) and key.lower().replace("_", "").endswith(_SECRET)


def _configured_name(key: str) -> str:
    """`stop_timeout_s` is called `stopTimeout` by the user."""
    first, *rest = key.removesuffix("_s").replace("limit_bytes", "limit").split("_")
    return first + "".join(word.capitalize() for word in rest)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}..."
