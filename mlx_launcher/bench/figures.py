"""Medians and spreads of what was measured."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_launcher.bench.measure import Measured
from mlx_launcher.errors import LaunchError

_KINDS = ("first", "follow_up", "long", "after_restart")


class Stored(NamedTuple):
    """What a server left in its cache folder."""

    files: int
    bytes: int


class Outcome(NamedTuple):
    """One backend: what was measured, or why nothing was. `stored` is None for one that keeps no cache on disk."""

    name: str
    measured: Measured | None = None
    stored: Stored | None = None
    error: LaunchError | None = None


class Spread(NamedTuple):
    """Of some values: their median, and between what the middle half of them lies. The unit is the values'."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """None where there is no value, or one is missing."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if len(known) == 1:
            return cls(known[0], known[0], known[0])
        low, _, high = statistics.quantiles(known, n=4, method="inclusive")
        return cls(statistics.median(known), low, high)

    @property
    def part(self) -> float:
        """How far the middle half reaches from the median, as a part of it."""
        return max(self.high - self.median, self.median - self.low) / self.median if self.median else 0.0


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The keys are a promise. Times are seconds until the end of the answer; a spread is {median, low, high, values}."""
    measured = outcome.measured or Measured()
    return {
        "name": outcome.name,
        "ok": outcome.error is None,
        "error": outcome.error.as_json() if outcome.error else None,
        "prompt_tokens": _spread([answer.prompt_tokens for answer in measured.first]),
        "first_request_s": _spread([answer.total_s for answer in measured.first]),
        "follow_up_s": _spread([answer.total_s for answer in measured.follow_up]),
        "after_restart_s": _spread([answer.total_s for answer in measured.after_restart]),
        "cached_tokens": {
            kind: _spread([answer.cached_tokens for answer in getattr(measured, kind)]) for kind in _KINDS
        },
        "prefill_tokens_per_s": _spread([answer.prefill_rate for answer in measured.first]),
        "decode_tokens_per_s": _spread([answer.decode_rate for answer in measured.long]),
        "cache": outcome.stored._asdict() if outcome.stored else None,
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    spread = Spread.of(values)
    return {**spread._asdict(), "values": list(values)} if spread else None
