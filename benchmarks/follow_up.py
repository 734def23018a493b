"""First requests and follow-ups while the prefix is hot, 8 tokens out, beside mlx_lm.server.

    python -m benchmarks.follow_up [--json]

Each round is a conversation that neither server has seen: its first request at the one and at the other, then follow-ups without
a pause, in turn at both. Times are seconds to the end of the streamed answer.
"""

import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.row import Row, at_least, at_most, interleaved, of_medians, show, spread
from benchmarks.servers import MODEL, TOKENS_OUT, MlxLm, Ours, both, conversation, next_turn, words_of
from mlx_launcher.bench.client import Answer, Message


class Goals(NamedTuple):
    tokens: int
    called: str
    rounds: int
    faster: float  # a follow-up than its own first request


SIZES = (Goals(2400, "2.4k", 7, 20), Goals(8000, "8k", 3, 90))


FOLLOW_UPS = 6  # of each conversation


class Talk:
    """A conversation with one server."""

    def __init__(self, server: Ours | MlxLm, messages: list[Message]) -> None:
        self._server = server
        self._messages = messages
        self._known = 0
        self.first_s = 0.0

    def begin(self) -> None:
        answer = self._server.ask(self._messages)
        assert (answer.cached_tokens or 0) < 50, "the first request was not the first"
        self.first_s = answer.total_s
        self._go_on(answer)

    def follow_up(self, _: int) -> float:
        answer = self._server.ask(self._messages)
        assert (answer.cached_tokens or 0) >= self._known - 1, "the follow-up found no prefix"
        self._go_on(answer)
        return answer.total_s

    def _go_on(self, answer: Answer) -> None:
        assert answer.prompt_tokens is not None
        self._known = answer.prompt_tokens
        self._messages = next_turn(self._messages, answer, "Go on.")


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory, both(Path(directory)) as (ours, theirs):
        return [row for goals in SIZES for row in _rows(goals, ours, theirs)]


def _rows(goals: Goals, ours: Ours, theirs: MlxLm) -> list[Row]:
    count = words_of(ours, goals.tokens)

    first, their_first = list[float](), list[float]()
    follow_up, their_follow_up = list[float](), list[float]()
    for number in range(goals.rounds):
        mine, other = (Talk(server, conversation(goals.tokens + number, count)) for server in (ours, theirs))
        for talk in (mine, other) if number % 2 else (other, mine):
            talk.begin()
        a, b = interleaved(FOLLOW_UPS, mine.follow_up, other.follow_up)
        first.append(mine.first_s)
        their_first.append(other.first_s)
        follow_up.append(statistics.median(a))
        their_follow_up.append(statistics.median(b))
    what = (
        f"medians of {goals.rounds} conversations with {FOLLOW_UPS} follow-ups each, {goals.tokens:,} tokens in, "
        f"{TOKENS_OUT} out, {MODEL}"
    )
    return [
        at_least(
            f"follow-up on a {goals.called}-token prefix, {TOKENS_OUT} tokens out",
            "its own first request",
            goals.faster,
            of_medians(first, follow_up),
            f"{_seconds(follow_up)} against {_seconds(first)}, {what}",
            "a follow-up runs about 30 new tokens and decodes 8, each over the whole prefix; it and the first request both take "
            "less than mlx_lm.server's (the two rows below), the first request by more",
        ),
        at_most(
            f"first request of {goals.called} tokens, nothing cached",
            "mlx_lm.server's first request",
            1.03,
            of_medians(first, their_first),
            f"{_seconds(first)} against {_seconds(their_first)}, {what}",
        ),
        at_most(
            f"follow-up on a {goals.called}-token prefix, hot",
            "mlx_lm.server's in-memory follow-up",
            1.0,
            of_medians(follow_up, their_follow_up),
            f"{_seconds(follow_up)} against {_seconds(their_follow_up)}, {what}",
        ),
    ]


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} s ({spread(values)})"


if __name__ == "__main__":
    show(measure())
