"""One picture of `mlx-launch status --watch`: what a status looks like while it changes."""

import calendar
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from mlx_launcher.cli.logs import event_line
from mlx_launcher.cli.output import clean
from mlx_launcher.cli.progress import moving_line
from mlx_launcher.cli.screen import WIDTH, columns, duration, fit, on_disk, rank_rows, row, size, take

# Tokens a second are those of so many looks, which come once a second as the beats do: of fewer they would jump.
_LOOKS = 4
_LABEL = columns(row("", ""))


class Rate:
    """Tokens a second just now, from how many there were at each look."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque(maxlen=_LOOKS)

    def seen(self, now: float, status: dict[str, Any]) -> float | None:
        """None before there are two looks at one server. `now` is in seconds on any clock that does not jump."""
        tokens = int(status["activity"]["completion_tokens"])
        if self._looks and tokens < self._looks[-1][1]:
            self._looks.clear()
        self._looks.append((now, tokens))
        (then, before), (_, after) = self._looks[0], self._looks[-1]
        return (after - before) / (now - then) if now > then else None


def picture(
    status: dict[str, Any], rate: float | None, at: float, width: int, height: int, trouble: str | None = None
) -> list[str]:
    """At most `height` lines of at most `width` columns; the first begins with the port and the state. `at` is time.time(),
    `trouble` why the status is not a new one.
    """
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    head = f"{_headline(status):<{max(0, min(width, WIDTH) - len(clock) - 1)}} {clock}"
    lines = [
        head,
        *([f"  {clean(trouble)}"] if trouble else []),
        *(row(label, clean(text)) for label, text in _rows(status, rate, max(0, width - _LABEL))),
    ]
    events = [_event(event, at) for event in reversed(status["events"])]
    lines += ["", "  last events", *events] if events else []
    return [line if columns(line) <= width else take(line, width - 3) + "..." for line in lines[:height]]


def _headline(status: dict[str, Any]) -> str:
    doing = "draining" if status["draining"] else status["phase"]
    return f"port {status['port']}: {status['state']}{f' ({doing})' if doing else ''}"


def _rows(status: dict[str, Any], rate: float | None, room: int) -> Iterator[tuple[str, str]]:
    """Each label with its text, which says less where there is little `room`."""
    yield "model", fit(status["model"]["id"], max(room, 3))
    backend, configured = status["backend"], status["configured_backend"]
    yield "backend", backend if backend == configured else f"{backend} instead of {configured}"
    yield "progress", _progress(status)
    did, speed = status["activity"], status.get("speed", {})
    yield "requests", f"{did['in_flight']} in flight, {did['queued']} queued, {did['requests']:,} done"
    decoding = _short(speed.get("last_minute_tokens_per_s"))
    yield "tokens/s", f"{_short(rate)} now, pauses included; {decoding} while decoding (last minute)"
    waits = (speed.get("first_token_cold_s"), "cold"), (speed.get("first_token_warm_s"), "warm")
    yield "first token", ", ".join(f"{_seconds(value)} {what}" for value, what in waits) + ", the queue included"
    yield "cache", _cache(status, room)
    yield "memory", _memory(status)
    yield from rank_rows(status)
    if problem := status["kv_cache"].get("problem"):
        yield "kv cache", problem
    for note in status["notes"]:
        yield "note", note
    if status["last_error"]:
        yield "last error", status["last_error"]


def _progress(status: dict[str, Any]) -> str:
    server = status["server"]
    if not status["phase"] or not server:
        return f"up {duration(server['uptime_s'])}" if server else "nothing is loaded"
    return moving_line(status["phase"], status["progress"], server["uptime_s"])


def _cache(status: dict[str, Any], room: int) -> str:
    did, cache = status["activity"], status["kv_cache"]
    share = f"{did['cached_tokens'] / did['prompt_tokens']:.0%}".replace("%", " %") if did["prompt_tokens"] else "-"
    kept = [on_disk(cache), *([f"{size(cache['memory_bytes'])} in memory"] if cache.get("memory_bytes") else [])]
    long, short = (", ".join([f"{share} {what}", *kept]) for what in ("of the prompts' tokens", "reused"))
    return long if columns(long) <= room else short


def _memory(status: dict[str, Any]) -> str:
    processes = ((name, status.get(name)) for name in ("server", "standby", "supervisor"))
    parts = [f"{name} {size(process['rss_bytes'])}" for name, process in processes if process]
    ranks = [rank["rss_bytes"] for rank in status.get("ranks", [])]
    return ", ".join([*parts, *([f"all ranks {size(sum(ranks))}"] if ranks and None not in ranks else [])])


def _event(event: dict[str, Any], at: float) -> str:
    try:
        age = duration(max(0.0, at - calendar.timegm(time.strptime(str(event.get("at")), "%Y-%m-%dT%H:%M:%SZ"))))
    except ValueError:
        age = "?"
    return f"  {age:>12}  {event_line({**event, 'at': ''})}"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return duration(value) if value is not None and value >= 60 else f"{_short(value)} s" if value is not None else "-"
