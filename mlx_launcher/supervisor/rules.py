"""What is borne of a server: the numbers of its plan, and how many crashes are left of them. Pure, as the policy."""

from collections.abc import Callable
from typing import Literal, NamedTuple

JITTER = 0.1

# Why a server takes the place of another. `crash`: that one ended, or never proved itself; `rollback`: another backend or plan
# does what this one could not; `demand`: nothing was loaded, and somebody came.
Cause = Literal["crash", "hang", "freeze", "memory", "asked", "rollback", "demand"]


class Rules(NamedTuple):
    """Seconds, and the number of crashes within `window_s` that are answered with a restart.

    `hang_s` bounds how long a start may show no progress and work may stand still, `freeze_s` how long nothing at all may be
    heard of a host; 0 is no bound. After `idle_s` without work a host is ended until somebody asks; 0 is never. `fallback`:
    whether there is one.
    """

    max_restarts: int
    window_s: float
    backoff_s: float
    backoff_max_s: float
    stop_timeout_s: float
    hang_s: float
    freeze_s: float
    memory_limit_bytes: int | None = None
    fallback: bool = False
    idle_s: float = 0.0


class Budget:
    """Counts crashes. `jitter` gives numbers from 0 to 1.

    The window is counted in seconds of service, not of the clock: a server that takes minutes to load and then dies would
    otherwise never fill it, and be restarted for ever.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._served_s = 0.0
        self._crashes: list[float] = []  # in seconds of service

    def served(self, seconds: float) -> None:
        """A server was ready for that long."""
        self._served_s += seconds

    def forgive(self) -> None:
        """Another server begins: what its predecessor did does not count against it."""
        self._crashes = []

    def crash(self, rules: Rules) -> float | None:
        """Seconds to wait before the next start; None when the budget is spent."""
        self._crashes = [at for at in self._crashes if at > self._served_s - rules.window_s]
        self._crashes.append(self._served_s)
        count = len(self._crashes)
        if count > rules.max_restarts:
            return None
        if count == 1:
            return 0.0
        delay = min(rules.backoff_s * 2.0 ** min(count - 2, 60), rules.backoff_max_s)
        return delay * (1 + JITTER * self._jitter())

    def verdict(self, rules: Rules, why: str) -> str:
        """Why it is spent, the last crash having happened for the reason `why`."""
        count = len(self._crashes)
        return f"{count} crashes within {rules.window_s:g} s of service, the last one: {why}" if count > 1 else why
