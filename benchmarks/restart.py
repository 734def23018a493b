"""The first request of a conversation after a restart, its prefix on disk, beside mlx_lm.server, which keeps none.

    python -m benchmarks.restart [--json]

Each round restarts both. Both have their model loaded and have answered a short request before the clock starts: what is compared
is what the prefix costs, not the start (benchmarks/first_token.py does that).
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.row import Row, at_least, interleaved, of_medians, show, spread
from benchmarks.servers import MODEL, TOKENS_OUT, MlxLm, Ours, both, conversation, next_turn, user, words_of
from mlx_launcher.bench.client import Message

SIZES = ((2400, "2.4k", 5, 15.0), (8000, "8k", 3, 60.0))  # tokens, how they are called, rounds, goal


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory, both(Path(directory)) as (ours, theirs):
        return [_row(ours, theirs, *size) for size in SIZES]


def _row(ours: Ours, theirs: MlxLm, tokens: int, called: str, rounds: int, goal: float) -> Row:
    count = words_of(ours, tokens)
    cached = []

    def kept(number: int) -> float:
        talk = conversation(tokens + number, count)
        first = ours.ask(talk)
        ours.restart()
        ours.ask([user("Hi")], 1)
        answer = ours.ask(next_turn(talk, first, "Go on."))
        cached.append(answer.cached_tokens or 0)
        return answer.total_s

    def computed(number: int) -> float:
        talk = conversation(tokens + number, count)
        theirs.restart()
        answer: Message = {"role": "assistant", "content": "12345678"}
        return theirs.ask([*talk, answer, user("Go on.")]).total_s

    a, b = interleaved(rounds, kept, computed)
    detail = (
        f"{statistics.median(a):.3f} s ({spread(a)}) against {statistics.median(b):.3f} s ({spread(b)}), medians of {rounds}, "
        f"{tokens:,} tokens in ({statistics.median(cached):,.0f} from the disk), {TOKENS_OUT} out, {MODEL}"
    )
    what = f"first request after a restart, prefix of {called} tokens on disk"
    return at_least(what, "mlx_lm.server after a restart", goal, of_medians(b, a), detail)


if __name__ == "__main__":
    show(measure())
