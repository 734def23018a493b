"""What `status` answers, and the file that tells it after the supervisor has ended."""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH105, PTH108, PTH123

import contextlib
import json
import os
from typing import Any, TypedDict

from mlx_launcher.buckets import BOUNDS, median
from mlx_launcher.plan import Plan, compared
from mlx_launcher.supervisor import plans
from mlx_launcher.supervisor.standby import StandbyStatus
from mlx_launcher.supervisor.totals import as_dict, counted

STATE_NAME = "state.json"
SCHEMA = 1

_ACTIVITY = ("in_flight", "queued", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "idle_s")
# Without a `dir` nobody has told what there is, if there is any.
NO_KV_CACHE: dict[str, Any] = {"dir": None, "entries": 0, "bytes": 0, "limit_bytes": None}


class ServerStatus(TypedDict):
    pid: int
    uptime_s: float
    rss_bytes: int | None
    restarts: int
    last_exit: dict[str, Any] | None


class Seen(TypedDict):
    """What only the loop knows. `beat` is the host's last message of that type, or empty; `rollback` is why the fallback runs;
    `start_s` is how many seconds the last start took; `service`, that a service manager started the supervisor.
    """

    state: str
    phase: str | None
    progress: dict[str, int] | None
    draining: bool
    last_error: str | None
    uptime_s: float
    rss_bytes: int | None
    server: ServerStatus | None
    standby: StandbyStatus | None
    start_s: float | None
    service: bool
    listener: str
    on_fallback: bool
    rollback: dict[str, Any] | None
    reload: dict[str, Any] | None
    beat: dict[str, Any]
    metrics: dict[str, str | None] | None
    events: list[dict[str, Any]]


def build(plan: Plan, seen: Seen) -> dict[str, Any]:
    """The `status` data of CLI.md, with `progress`, `standby`, `ranks`, `start_s`, `service`, `speed`, `metrics`, `reload`,
    `events`, `notes`, `log_file`, `port` and `settings` beside it.
    """
    beat = seen["beat"]
    return {
        "state": seen["state"],
        "phase": seen["phase"],
        "progress": seen["progress"],
        "url": plan["url"],
        "listener": seen["listener"],
        "draining": seen["draining"],
        "backend": plans.backend(plan, seen["on_fallback"])["name"],
        "configured_backend": plan["backend"]["name"],
        "rollback": seen["rollback"] if seen["on_fallback"] else None,
        "model": dict(plan["model"]),
        "supervisor": {"pid": os.getpid(), "uptime_s": round(seen["uptime_s"], 1), "rss_bytes": seen["rss_bytes"]},
        "server": seen["server"],
        "standby": seen["standby"],
        "start_s": seen["start_s"],
        "service": seen["service"],
        "activity": {key: beat.get(key, 0.0 if key == "idle_s" else 0) for key in _ACTIVITY},
        "ranks": beat.get("ranks") or [],
        "speed": _speed(beat),
        "kv_cache": {**NO_KV_CACHE, **as_dict(beat.get("kv_cache")), **({} if seen["server"] else {"memory_bytes": 0})},
        "metrics": seen["metrics"],
        "last_error": seen["last_error"],
        "reload": seen["reload"],
        "notes": beat.get("notes", []),
        "events": seen["events"],
        "log_file": plan["log_file"],
        "port": plan["port"],
        "settings": compared(plan),
    }


def _speed(beat: dict[str, Any]) -> dict[str, float | None]:
    """Medians of what the server's users waited for a first token, in seconds, and its tokens a second while decoding."""
    counts, rates = counted(beat)["counts"], as_dict(beat.get("tokens_per_s"))
    waits = {name: median(BOUNDS[name], counts[name]) for name in ("first_token_cold_s", "first_token_warm_s")}
    return {
        **{name: wait if wait is None else round(wait, 4) for name, wait in waits.items()},
        **{f"{name}_tokens_per_s": rates.get(name) for name in ("last_answer", "last_minute")},
    }


def progress(message: dict[str, Any]) -> dict[str, int] | None:
    """How many bytes of how many a host's phase says; None where it does not say."""
    done, total = message.get("done"), message.get("total")
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        return {"done": min(max(done, 0), total), "total": total}
    return None


def without_server(beat: dict[str, Any]) -> dict[str, Any]:
    """What stays true of the last beat when its server is gone: what it had done, and what lies on the disk."""
    cache = {key: value for key, value in as_dict(beat.get("kv_cache")).items() if key in NO_KV_CACHE}
    return {**beat, "in_flight": 0, "queued": 0, "ranks": [], "notes": [], "kv_cache": cache}


def headline(status: dict[str, Any]) -> str:
    """The state as one line for a person."""
    state, reason = status["state"], status["last_error"]
    if state in ("ready", "degraded"):
        if status["draining"]:
            return "stopping: waiting for the requests in flight"
        return f"ready {status['url']}" + (f", {degraded(status)}" if state == "degraded" else "")
    if state == "stopped":
        return "stopped"
    if state == "idle":
        took = f", which took {seen_s:.0f} s last time" if (seen_s := status["start_s"]) is not None else ""
        return f"idle: nothing is loaded; the next request starts it{took}"
    if status["draining"]:
        return "stopping"
    if state == "failed" or (state == "restarting" and status["phase"] is None):
        return f"{state}: {reason}" if reason else state
    progress = status["progress"]
    if status["phase"] == "loading" and progress:
        return f"loading {progress['done'] * 10 // progress['total'] * 10} %"
    return str(status["phase"] or state)


def degraded(status: dict[str, Any]) -> str:
    """What runs in place of what, and why."""
    rollback = status["rollback"] or {"reason": None}
    return f"on {status['backend']} instead of {status['configured_backend']}: {rollback['reason']}"


def write_state(
    pid_started: float | None, server: dict[str, Any] | None, standby: dict[str, Any] | None, status: dict[str, Any]
) -> str | None:
    """Replaces state.json in the working directory, whole or not at all; why it could not be, or None.

    `server` and `standby` are what a later supervisor needs to find them.
    """
    state = {"schema": SCHEMA, "pid": os.getpid(), "pid_started": pid_started, "server": server, "standby": standby}
    text = json.dumps({**state, "status": status})
    new = f".{STATE_NAME}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            data = text.encode()
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        os.replace(new, STATE_NAME)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        return error.strerror or str(error)
    return None


def read_state() -> tuple[dict[str, Any] | None, str | None]:
    """state.json of the working directory as it was left, and why it is not usable where it exists and is not."""
    try:
        with open(STATE_NAME, "rb") as file:
            state = json.loads(file.read())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, str(error)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        return None, "it is not a state of this version"
    return state, None
