"""Tokens a second while decoding: streamed over HTTP by the host, against mlx-lm generating directly. Greedy.

python -m benchmarks.decode [--json]
"""

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.direct import Direct
from benchmarks.row import Row, at_least, interleaved, of_medians, show, spread
from benchmarks.streaming import stream
from mlx_launcher.demo import build_random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hosts import Host
from support.waiting import free_port

ROUNDS = 41
TOKENS = 512
PROMPT = "Tell me of the sea, and of those who cross it."


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        model = build_random(Path(directory) / "random")
        cache = Path(directory) / "kvcache"
        with Direct(model) as direct, Host(model, free_port(), cache, cache={"enabled": False}) as host:

            def ours(_: int) -> float:
                answer = stream(host.port, PROMPT, TOKENS)
                assert answer.tokens == TOKENS
                return answer.after_first / answer.rest_s

            def theirs(_: int) -> float:
                answer = direct.generate(PROMPT, TOKENS)
                assert answer.tokens == TOKENS
                return (TOKENS - 1) / answer.rest_s

            assert stream(host.port, PROMPT, TOKENS).text == direct.generate(PROMPT, TOKENS).text
            a, b = interleaved(ROUNDS, ours, theirs)
    detail = (
        f"{statistics.median(a):,.0f} against {statistics.median(b):,.0f} tokens/s, medians of {ROUNDS} "
        f"({spread(a)}, {spread(b)}), {TOKENS} tokens, llama of 11 MB (float32)"
    )
    why = (
        "what the engine does for a token takes no longer than mlx-lm's own loop, called in one process; the rest is the "
        "event loop and the client, which share two cores with MLX's two threads: the same for every token, so less of "
        "any larger model's time (a token of this one takes 2.4 ms)"
    )
    measure = "tokens a second while decoding, streamed, greedy"
    return [at_least(measure, "mlx-lm generating directly", 0.97, of_medians(a, b), detail, why)]


if __name__ == "__main__":
    show(measure())
