"""What all servers of a supervisor have done: a server that ends takes nothing of it away."""

from typing import Any, TypedDict

from mlx_launcher.buckets import BOUNDS, OUTCOMES
from mlx_launcher.supervisor.liveness import number

TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")


class Counted(TypedDict):
    """`tokens` by kind, `answers` by how they ended; for each histogram `counts` by bucket and `sums` in seconds (buckets.py)."""

    tokens: dict[str, int]
    answers: dict[str, int]
    counts: dict[str, list[int]]
    sums: dict[str, float]


class Totals:
    """Takes the beats of servers that were proved: what a proof costs is none of a user's."""

    def __init__(self) -> None:
        self._ended = self._running = counted({})
        self._open = 0

    def heard(self, beat: dict[str, Any]) -> None:
        self._running, self._open = counted(beat), number(beat.get("open"))

    def ends(self) -> None:
        """The server whose beats were heard is gone, and with it what it had not answered yet."""
        self._ended, self._running = self.seen(), counted({})
        self._ended["answers"]["cut"] += self._open
        self._open = 0

    def seen(self) -> Counted:
        """All that was done so far."""
        a, b = self._ended, self._running
        return {
            "tokens": {key: a["tokens"][key] + b["tokens"][key] for key in TOKENS},
            "answers": {key: a["answers"][key] + b["answers"][key] for key in OUTCOMES},
            "counts": {
                key: [one + other for one, other in zip(a["counts"][key], b["counts"][key], strict=True)]
                for key in BOUNDS
            },
            "sums": {key: a["sums"][key] + b["sums"][key] for key in BOUNDS},
        }


def counted(beat: dict[str, Any]) -> Counted:
    """What one beat says; zero for all that it does not say, or says in another form."""
    answers, timings = as_dict(beat.get("answers")), as_dict(beat.get("timings"))
    told = {name: as_dict(timings.get(name)) for name in BOUNDS}
    return {
        "tokens": {key: number(beat.get(key)) for key in TOKENS},
        "answers": {key: number(answers.get(key)) for key in OUTCOMES},
        "counts": {name: _counts(told[name].get("counts"), len(bounds) + 1) for name, bounds in BOUNDS.items()},
        "sums": {name: _seconds(told[name].get("sum")) for name in BOUNDS},
    }


def as_dict(value: Any) -> dict[str, Any]:
    """What a host reports under names; empty for anything else."""
    return value if isinstance(value, dict) else {}


def _counts(value: Any, length: int) -> list[int]:
    return [number(count) for count in value] if isinstance(value, list) and len(value) == length else [0] * length


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
