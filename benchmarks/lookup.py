"""The longest match among 50 conversations of 18,000 tokens that begin alike, as a share of the 5 ms that it may take.

python -m benchmarks.lookup [--json]
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.row import Row, show, spread, within
from mlx_launcher.kvcache.files import Tensor, entries
from mlx_launcher.kvcache.store import Limits, Store

ENTRIES, TOKENS, SHARED, TURN = 50, 18_000, 12_000, 500
GOAL_MS = 5.0


def measure() -> list[Row]:
    chance = random.Random(0)
    beginning = [chance.randrange(150_000) for _ in range(SHARED)]
    prompts = [[*beginning, *(chance.randrange(150_000) for _ in range(TOKENS - SHARED))] for _ in range(ENTRIES)]
    taken = []
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory) / "model", Limits(slots=2 * ENTRIES, min_tokens=100, max_bytes=1 << 40))
        for prompt in prompts:
            for end in range(TURN, TOKENS + 1, TURN):
                after = store.held(prompt[:end])
                new = prompt[after.usable if after else 0 : end]
                if new:
                    store.add(after, new, [Tensor("x", "U8", (1,), memoryview(b"x"))])
        for _ in range(200):
            prompt = [*chance.choice(prompts), 1, 2, 3]
            began = time.perf_counter()
            match = store.find(prompt)
            taken.append(time.perf_counter() - began)
            assert match
            assert match.usable == TOKENS
        files = len(list(entries(store.directory)))
    middle = statistics.median(taken)
    detail = (
        f"{middle * 1000:.2f} ms, median of {len(taken)} ({spread(taken)}), worst {max(taken) * 1000:.2f} ms; {ENTRIES} "
        f"conversations of {TOKENS:,} tokens in {files:,} files, {SHARED:,} tokens of them shared"
    )
    milliseconds = middle * 1000
    return [
        within("lookup of a prompt in the KV cache", "–", GOAL_MS, "ms", milliseconds, milliseconds / GOAL_MS, detail)
    ]


if __name__ == "__main__":
    show(measure())
