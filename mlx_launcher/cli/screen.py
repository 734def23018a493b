"""The human side: what a status looks like on a terminal, never wider than 80 columns."""

import json
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_launcher.cli.output import App, clean, paint
from mlx_launcher.cli.tail import last_lines

WIDTH = 80
_LABEL = 12
_ROOM = WIDTH - _LABEL - 2
# What is cut where it is too long; all else wraps, up to so many lines: of a reason the middle may tell most.
_CUT = ("url", "model", "path", "log")
_MOST_LINES = 4


def status_screen(status: dict[str, Any]) -> list[str]:
    """A running server on one screen. `status` is what the supervisor answers."""
    return [_first_line(status), *(line for label, text in _rows(status) for line in _lines(label, clean(str(text))))]


def _lines(label: str, text: str) -> Iterator[str]:
    if label in _CUT:
        yield row(label, fit(text, _ROOM))
        return
    most = _ROOM * _MOST_LINES
    for number, part in enumerate(wrapped(text if columns(text) <= most else take(text, most - 3) + "...", _ROOM)):
        yield row("" if number else label, part)


def failed_screen(status: dict[str, Any], log: Path, lines: int) -> list[str]:
    """A server that gave up: what it was, and the last lines of its log."""
    named = [row("model", fit(clean(status["model"]["id"]), _ROOM)), row("log", fit(clean(str(log)), _ROOM))]
    excerpt = [part for line in last_lines(log, lines) for part in wrapped(clean(line[:1000]), WIDTH - 4) if part]
    return [_first_line(status), *named, *(f"  | {part}" for part in excerpt)]


def ready_screen(app: App, status: dict[str, Any], require_key: bool) -> list[str]:
    """What somebody who just started a server wants to know next: the address, how to try it, how to stop it.

    Nothing here is shortened: it is there to be copied.
    """
    question = {"model": status["model"]["id"], "messages": [{"role": "user", "content": "Hello"}]}
    curl = [
        f"curl {shlex.quote(status['url'] + '/chat/completions')}",
        "-H 'Content-Type: application/json'",
        f"-d {shlex.quote(json.dumps(question))}",
    ]
    if require_key:
        curl.insert(2, '-H "Authorization: Bearer $MLX_API_KEY"')
    return [
        row("url", status["url"]),
        row("state", paint(status["state"], sys.stdout)),
        *([row("server", _no_server(status))] if status["state"] == "idle" else []),
        *degraded_rows(app, status),
        row("model", clean(status["model"]["id"])),
        "",
        "Try it:",
        "  " + " \\\n    ".join(curl),
        "Stop it:",
        "  " + app.typed("stop", status["port"]),
    ]


def degraded_rows(app: App, status: dict[str, Any]) -> list[str]:
    """That the fallback serves, why, and what to do about it; nothing where it does not."""
    if not (rollback := status["rollback"]):
        return []
    return [
        row("backend", clean(f"{status['backend']} instead of {status['configured_backend']}")),
        row("reason", clean(rollback["reason"])),
        row("try again", app.typed("restart", status["port"])),
    ]


def serves(status: dict[str, Any]) -> bool:
    """Whether a server is there for requests and stays."""
    return status["state"] in ("ready", "idle", "degraded") and not status["draining"]


def phase_text(status: dict[str, Any]) -> str:
    """What a server that is not ready yet is doing, without numbers that change: "loading", "restarting: reason"."""
    if status["draining"]:
        return "stopping"
    text = str(status["phase"] or status["state"])
    if status["state"] == "restarting" and status["last_error"]:
        text += f" after: {clean(status['last_error'])}"
    return text


def size(count: int | None) -> str:
    """Bytes for people, in powers of ten: 999 B, 1.5 kB, 12 MB."""
    if count is None:
        return "?"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" and value < 10 else f"{value:.0f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds for people, in the two units that matter: 45 s, 3 min 12 s, 2 h 5 min, 4 d 1 h."""
    if seconds is None:
        return "?"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def fit(text: str, width: int) -> str:
    """The text in at most `width` columns, with dots for what is left out of its middle: the ends of a path tell most."""
    if columns(text) <= width:
        return text
    front, back = (width - 3) // 3, width - 3 - (width - 3) // 3
    return f"{take(text, front)}...{take(text[::-1], back)[::-1]}"


def columns(text: str) -> int:
    """How wide a terminal shows it."""
    return len(text) if text.isascii() else sum(map(_width, text))


def wrapped(text: str, width: int) -> list[str]:
    """Broken between words, and within a word only where that alone is too wide, as paths are."""
    lines = [""]
    for word in text.split(" "):
        if columns(lines[-1]) + columns(word) >= width and lines[-1]:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while columns(lines[-1]) > width:
            part = take(lines[-1], width)
            lines[-1:] = [part, lines[-1][len(part) :]]
    return lines


def take(text: str, width: int) -> str:
    """As much of its beginning as `width` columns hold."""
    taken = ""
    for char in text:
        width -= _width(char)
        if width < 0:
            break
        taken += char
    return taken


def _width(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _first_line(status: dict[str, Any]) -> str:
    notes = [status["phase"], "draining" if status["draining"] else None]
    if status["listener"] == "lent":
        notes.append("the server holds the port itself")
    doing = ", ".join(note for note in notes if note)
    return f"port {status['port']}: {paint(status['state'], sys.stdout)}{f' ({doing})' if doing else ''}"


def _rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "url", status["url"]
    model = status["model"]
    yield "model", model["id"]
    if model["path"] != model["id"]:
        yield "path", model["path"]
    backend, configured = status["backend"], status["configured_backend"]
    yield "backend", backend if backend == configured else f"{backend} instead of {configured}"
    if rollback := status["rollback"]:
        yield "rollback", rollback["at"] + (", automatic" if rollback["automatic"] else "")
        yield "reason", rollback["reason"]
    yield "supervisor", _process(status["supervisor"])
    server = status["server"]
    yield "server", _process(server) if server else _no_server(status)
    yield from rank_rows(status)
    if standby := status.get("standby"):
        yield "standby", f"pid {standby['pid']}, {size(standby['rss_bytes'])}, takes over after a crash"
    if server and server["restarts"]:
        yield "restarts", str(server["restarts"])
    if server and (last := server["last_exit"]):
        yield "last exit", f"{last['at']}, {last['reason']}"
    if did := status["activity"]:
        yield "requests", f"{did['requests']:,} done, {did['in_flight']} in flight, {did['queued']} queued"
        read = f"{did['prompt_tokens']:,} read ({did['cached_tokens']:,} from the cache)"
        yield "tokens", f"{read}, {did['completion_tokens']:,} written"
    if cache := status["kv_cache"]:
        yield "kv cache", on_disk(cache)
        if problem := cache.get("problem"):
            yield "kv cache", problem
    for note in status.get("notes", []):
        yield "note", note
    if metrics := status.get("metrics"):
        yield "metrics", metrics["problem"] or metrics["url"]
    if status["last_error"]:
        yield "last error", status["last_error"]
    reload = status.get("reload")
    if reload and reload["state"] != "done":
        what = "switch" if reload["trigger"] == "rollback" else "restart"
        yield what, f"{reload['state']}: {reload['reason']}" if reload["reason"] else reload["state"]
    yield "log", status["log_file"]


def on_disk(cache: dict[str, Any]) -> str:
    """What the KV cache has there: "3 entries, 2.1 MB of 18 GB"."""
    count, limit = cache["entries"], cache["limit_bytes"]
    if cache["dir"] is None:
        return "- entries"
    used = size(cache["bytes"]) + (f" of {size(limit)}" if limit else "")
    return f"{count:,} {'entry' if count == 1 else 'entries'}, {used}"


def _no_server(status: dict[str, Any]) -> str:
    if status["state"] != "idle":
        return "none"
    took = status.get("start_s")
    return "none, the next request starts it" + (f", which took {duration(took)} last time" if took is not None else "")


def rank_rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A row for each machine of a cluster."""
    for rank in status.get("ranks", []):
        yield f"rank {rank['rank']}", _rank(rank)


def _rank(rank: dict[str, Any]) -> str:
    """Of one that has just been started little is known."""
    pid, rss_bytes, step_s = rank["pid"], rank["rss_bytes"], rank["last_progress_s"]
    known = [] if pid is None else [f"pid {pid}"]
    known += [] if rss_bytes is None else [size(rss_bytes)]
    known += [] if step_s is None else [f"got on {duration(step_s)} ago"]
    return ", ".join([rank["host"], rank["state"], *known])


def _process(process: dict[str, Any]) -> str:
    return f"pid {process['pid']}, up {duration(process['uptime_s'])}, {size(process['rss_bytes'])}"


def row(label: str, text: str) -> str:
    """One line of a screen, as wide as it gets."""
    return f"  {label:<{_LABEL}}{text}"
