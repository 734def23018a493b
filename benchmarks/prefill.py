"""Prompt tokens a second, 8k tokens with nothing cached: the host over HTTP, against mlx-lm generating directly.

    python -m benchmarks.prefill [--json]

What is timed is the request up to its first token, so ours holds the HTTP, the chat template and the tokenizer as well.
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

ROUNDS = 5
# A byte is a token of the random model; its prompts are told apart by their number, so that nothing can be reused.
WORDS = "the sea rises and the ship goes on "
PROMPT_TOKENS = 8192


def prompt(number: int) -> str:
    return f"{number:04} {WORDS * (PROMPT_TOKENS // len(WORDS))}"


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        model = build_random(Path(directory) / "random")
        cache = Path(directory) / "kvcache"
        with Direct(model) as direct, Host(model, free_port(), cache, cache={"enabled": False}) as host:

            def ours(number: int) -> float:
                answer = stream(host.port, prompt(number), 2)
                assert answer.cached_tokens == 0
                return answer.prompt_tokens / answer.first_s

            def theirs(number: int) -> float:
                answer = direct.generate(prompt(number), 2)
                return answer.prompt_tokens / answer.first_s

            ours(ROUNDS), theirs(ROUNDS)
            a, b = interleaved(ROUNDS, ours, theirs)
    detail = (
        f"{statistics.median(a):,.0f} against {statistics.median(b):,.0f} tokens/s, medians of {ROUNDS} "
        f"({spread(a)}, {spread(b)}), {PROMPT_TOKENS} tokens, llama of 11 MB (float32)"
    )
    return [
        at_least("prefill tokens a second, 8k prompt", "mlx-lm generating directly", 0.97, of_medians(a, b), detail)
    ]


if __name__ == "__main__":
    show(measure())
