"""Busy or hung: what a server lets be heard of itself, judged over time. Pure, as the policy that it serves.

Never does one measurement alone end a server: a beat that is late, a page that is not answered may only mean that much is done.
"""

from typing import Any

# What in a beat moves while work is done.
COUNTERS = ("requests", "tokens", "prompt_tokens", "cached_tokens", "processed_tokens", "completion_tokens")
# Beats come once a second. After a pause this long the host stood still itself, as in a sleeping laptop.
HOST_GAP_S = 5.0
# A server that only waits for connections uses up to half a percent of a core, one that works many times more.
IDLE_SHARE = 0.01


class Silence:
    """Since when nothing was heard of a server, which has `limit_s` seconds; 0 is no limit.

    With `by_cpu` that alone says nothing: in the second half of that time its processes must also have done no work, so
    `looked` has to be called at `due`, with what they have used of the processor by then.
    """

    def __init__(self, now: float, limit_s: float, by_cpu: bool) -> None:
        self.limit_s, self.by_cpu = limit_s, by_cpu
        self._since = now
        self._sample: tuple[float, float] | None = None

    def heard(self, now: float) -> None:
        self._since, self._sample = now, None

    @property
    def due(self) -> float | None:
        if self.limit_s <= 0:
            return None
        if not self.by_cpu:
            return self._since + self.limit_s
        return (self._sample[0] if self._sample else self._since) + self.limit_s / 2

    def looked(self, now: float, cpu_s: float | None) -> bool:
        """Whether the time is over. What cannot be measured (None) is held for work."""
        if cpu_s is None:
            self.heard(now)
            return False
        last, self._sample = self._sample, (now, cpu_s)
        return last is not None and abs(cpu_s - last[1]) <= IDLE_SHARE * (now - last[0])


class Work:
    """Whether what is in flight gets on: `seen` takes each beat."""

    def __init__(self) -> None:
        self._last = 0.0
        self._counters = (0,) * len(COUNTERS)
        self._still_since: float | None = None

    def seen(self, now: float, beat: dict[str, Any]) -> bool:
        """Whether the counters moved since the beat before."""
        counters = tuple(number(beat.get(name)) for name in COUNTERS)
        moved = counters != self._counters
        if not number(beat.get("in_flight")) + number(beat.get("queued")):
            self._still_since = None
        elif moved or self._still_since is None or now - self._last > HOST_GAP_S:
            self._still_since = now
        self._counters, self._last = counters, now
        return moved

    def still_s(self, now: float) -> float:
        """For how long there has been work and no counter moved."""
        return 0.0 if self._still_since is None else now - self._still_since


def number(value: Any) -> int:
    """A count that a host reports; 0 for anything else."""
    return value if isinstance(value, int) else 0


def unused_s(beat: dict[str, Any]) -> float:
    """For how long a host has had nothing to do; 0 where it has, or does not say."""
    idle_s = beat.get("idle_s")
    if number(beat.get("in_flight")) + number(beat.get("queued")) or not isinstance(idle_s, int | float):
        return 0.0
    return float(idle_s)
