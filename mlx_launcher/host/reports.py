"""What a host tells its supervisor while it starts and while it serves."""

import platform
import time
from importlib import metadata
from typing import Any

import psutil

from mlx_launcher.host.channel import Channel
from mlx_launcher.host.engine import Counters

# Progress of a load is told at most this often.
PROGRESS_S = 0.1


# Ranks of a cluster that differ in one of these may compute unlike things, and wait for each other for ever.
_PACKAGES = ("mlx", "mlx-lm", "transformers", "mlx-launcher")


def versions() -> dict[str, str | None]:
    """What this process runs on, by name."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class Reports:
    """Phases and beats on a channel; may be called from any thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._process = psutil.Process()
        self._phase = ""
        self._told = 0.0

    def phase(self, phase: str, done: int | None, total: int | None) -> None:
        """A phase that began, or its progress in bytes."""
        now = time.monotonic()
        if phase == self._phase and done != total and now - self._told < PROGRESS_S:
            return
        self._phase, self._told = phase, now
        self._channel.send({"type": "phase", "phase": phase, "done": done, "total": total})

    def beat(self, counters: Counters, kv_cache: dict[str, Any] | None, notes: list[str], **more: Any) -> None:
        """That the host lives, and what it has done so far."""
        self._channel.send(
            {
                "type": "beat",
                "in_flight": counters.in_flight,
                "queued": counters.queued,
                "requests": counters.requests,
                "prompt_tokens": counters.prompt_tokens,
                "cached_tokens": counters.cached_tokens,
                "completion_tokens": counters.completion_tokens,
                "processed_tokens": counters.processed_tokens,
                "idle_s": round(time.monotonic() - counters.last_activity, 1),
                "rss_bytes": self._process.memory_info().rss,
                "kv_cache": kv_cache,
                "notes": notes,
                **counters.timings.told(),
                **more,
            }
        )
