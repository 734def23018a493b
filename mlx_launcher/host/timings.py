"""How long users wait for their first token and for each further one, and how their requests ended, counted for the beats."""

import threading
import time
from bisect import bisect_left
from collections import deque
from typing import Any

from mlx_launcher.buckets import BOUNDS, OUTCOMES
from mlx_launcher.host.errors import QueueFullError, RequestError

# The mean speed is of this long, looked at once a second.
RECENT_S = 60.0
_LOOK_S = 1.0
_CLIENT_LEFT = 499


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.count += 1
        self.sum += seconds


class Timings:
    """Of all answers of one server. Any thread may call; the numbers only grow, but for the two speeds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._histograms = {name: _Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._tokens = self._histograms["token_s"]
        self._asked = 0
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._last_speed: float | None = None
        # When, and how many tokens had been timed by then in how many seconds.
        self._looks: deque[tuple[float, int, float]] = deque([(time.monotonic(), 0, 0.0)])

    def first_token(self, seconds: float, warm: bool) -> None:
        with self._lock:
            self._histograms["first_token_warm_s" if warm else "first_token_cold_s"].add(seconds)

    def token(self, seconds: float) -> None:
        with self._lock:
            self._tokens.add(seconds)

    def decoded(self, tokens_per_s: float) -> None:
        """How fast an answer was, when it is over."""
        self._last_speed = tokens_per_s

    def asked(self) -> None:
        """A request for an answer has come."""
        with self._lock:
            self._asked += 1

    def ended(self, error: BaseException | None) -> None:
        """How a request for an answer ended: None for well. Cancelled: the client left, or the server's end cut it off."""
        with self._lock:
            self._outcomes[_outcome(error)] += 1

    def told(self) -> dict[str, Any]:
        """What a beat says: answers by outcome and how many are still `open`, histograms by name, and tokens a second while
        decoding, None where none were.
        """
        now = time.monotonic()
        with self._lock:
            if now >= self._looks[-1][0] + _LOOK_S:
                self._looks.append((now, self._tokens.count, self._tokens.sum))
            while len(self._looks) > 1 and self._looks[1][0] <= now - RECENT_S:
                self._looks.popleft()
            _, count, seconds = self._looks[0]
            count, seconds = self._tokens.count - count, self._tokens.sum - seconds
            return {
                "answers": dict(self._outcomes),
                "open": self._asked - sum(self._outcomes.values()),
                "timings": {
                    name: {"counts": list(histogram.counts), "sum": round(histogram.sum, 6)}
                    for name, histogram in self._histograms.items()
                },
                "tokens_per_s": {
                    "last_answer": _rounded(self._last_speed),
                    "last_minute": _rounded(count / seconds) if count and seconds else None,
                },
            }


class Stopwatch:
    """Times one request, from `asked_at` (time.monotonic(), when it came: the wait in the queue is part of what a user waits)."""

    def __init__(self, timings: Timings, asked_at: float | None = None) -> None:
        self._timings = timings
        self._asked_at = time.monotonic() if asked_at is None else asked_at
        self._warm = False
        self._waits = True  # for its first token
        self._first = self._last = 0.0
        self._tokens = 0

    def prompted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """An answer begins. It is warm when at least half of its prompt came from the KV cache."""
        self.over()
        self._warm = 2 * cached_tokens >= prompt_tokens

    def token(self) -> None:
        """A token was decoded. Of each the time since the one before is counted, of a request's first that since it came."""
        now = time.monotonic()
        if self._tokens:
            self._timings.token(now - self._last)
        else:
            self._first = now
            if self._waits:
                self._waits = False
                self._timings.first_token(now - self._asked_at, self._warm)
        self._last = now
        self._tokens += 1

    def over(self) -> None:
        """The answer has ended, as it may."""
        if self._tokens > 1 and self._last > self._first:
            self._timings.decoded((self._tokens - 1) / (self._last - self._first))
        self._tokens = 0


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, OSError) or not isinstance(error, Exception):
        return "cancelled"  # a connection that broke, or the end of the server's work on it
    if not isinstance(error, RequestError):
        return "server_error"
    if error.status == _CLIENT_LEFT or error.code == "stopping":
        return "cancelled"
    return "client_error" if error.status < 500 else "server_error"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
