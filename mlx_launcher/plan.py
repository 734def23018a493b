"""What the command hands to the supervisor: plain JSON, everything resolved, nothing left to look up.

The command writes it to an unlinked 0600 temporary file and passes the descriptor, because a plan holds keys (never argv or
environment) and may be larger than the 64 KiB that a pipe takes before a writer blocks. TypedDicts, because the supervisor
reads them and must import little.
"""

from typing import Any, Literal, TypedDict
from zlib import crc32


class Backend(TypedDict):
    """How one server is started.

    A "host" is ours: it gets `--channel FD --listen FD,FD` appended to `argv`, and `settings` by its channel with `activate`.
    A "script" or a "command" binds the port itself: the supervisor closes its listeners before the spawn. Its `argv` is
    complete, and `settings` hold what a probe through the port needs: `model_id`, `names` and `api_key`.
    """

    name: str
    kind: Literal["host", "script", "command"]
    argv: list[str]
    env: dict[str, str]
    cwd: str | None
    settings: dict[str, Any]


class Model(TypedDict):
    id: str
    path: str


class Restart(TypedDict):
    """When a crash becomes a crash loop: more than `max_restarts` within `window_s` seconds."""

    max_restarts: int
    window_s: float
    backoff_s: float
    backoff_max_s: float


class Source(TypedDict):
    """How the same plan is made again on `restart` and SIGHUP: the command's own argv, directory and environment."""

    argv: list[str]
    cwd: str
    env: dict[str, str]


class Plan(TypedDict):
    schema: int
    instance: (
        str  # absolute path of the instance's directory: lock, state.json, control.sock, server.log, journal.jsonl
    )
    hosts: list[str]  # addresses to bind, "127.0.0.1" and "::1" by default
    port: int
    url: str  # what clients use, "http://127.0.0.1:8081/v1"
    model: Model
    backend: Backend
    fallback: Backend | None
    stop_timeout_s: float
    hang_timeout_s: float
    freeze_timeout_s: float
    idle_timeout_s: float  # without work, after which a host is ended until somebody connects; 0 is never
    standby: bool  # whether a second host waits beside the one that serves
    memory_limit_bytes: int | None  # of the server; None is no limit
    metrics_port: int | None  # of the page with the metrics, on loopback; None is no page
    restart: Restart
    log_file: str  # the server's log; absolute
    log_max_bytes: int
    source: Source
    notes: list[str]  # warnings to show once at start and in the journal


# Of these no more than a checksum is compared: they may hold a secret.
CHECKSUMS = ("program", "env", "apiKey", "fallback")


def compared(plan: Plan) -> dict[str, Any]:
    """What makes two starts on one port the same server, by name; of what may hold a secret no more than a checksum.

    How the model is called is not part of it.
    """
    backend = plan["backend"]
    inner = backend["settings"]
    return {
        "model": plan["model"]["path"],
        "backend": backend["name"],
        "port": plan["port"],
        "hosts": plan["hosts"],
        "kind": backend["kind"],
        "program": _checksum(backend["argv"]),
        "env": _checksum(backend["env"]),
        "apiKey": _checksum(inner.get("api_key")),
        **{key: value for key, value in inner.items() if key not in ("api_key", *_NAMES)},
        "fallback": _checksum(_nameless(plan["fallback"])),
        **{name: plan.get(key) for name, key in _LIMITS.items()},
        "restart": dict(plan["restart"]),
    }


_LIMITS = {
    "stopTimeout": "stop_timeout_s",
    "hangTimeout": "hang_timeout_s",
    "freezeTimeout": "freeze_timeout_s",
    "idleTimeout": "idle_timeout_s",
    "standby": "standby",
    "memoryLimit": "memory_limit_bytes",
    "metricsPort": "metrics_port",
}


_NAMES = ("names", "model_id", "model_path")


def _nameless(backend: Backend | None) -> dict[str, Any] | None:
    if backend is None:
        return None
    settings = {key: value for key, value in backend["settings"].items() if key not in _NAMES}
    return {**backend, "settings": settings}


def _checksum(value: Any) -> str | None:
    return f"{crc32(repr(value).encode('utf-8', 'replace')):08x}" if value else None
