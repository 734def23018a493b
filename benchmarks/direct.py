"""mlx-lm generating directly, in a process of its own that waits between requests: what decode.py and prefill.py compare with.

python -m benchmarks.direct MODEL      a JSON line in, {"prompt": …, "max_tokens": …}; a JSON line out, see Timed
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """One generation: seconds from the call to the first token, and from there to the last of `tokens`."""

    prompt_tokens: int
    tokens: int
    first_s: float
    rest_s: float
    text: str


class Direct:
    """`with Direct(model) as direct`: loaded inside."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.direct", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> "Direct":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def generate(self, prompt: str, max_tokens: int) -> Timed:
        """Greedy, as one user message; nothing is kept from one call to the next."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"prompt": prompt, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return Timed(*json.loads(self._process.stdout.readline()))


def _generate(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> Timed:
    from mlx_lm import stream_generate

    tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    texts, first = [], 0.0
    began = time.perf_counter()
    for answer in stream_generate(model, tokenizer, tokens, max_tokens=max_tokens):
        first = first or time.perf_counter()
        texts.append(answer.text)
    ended = time.perf_counter()
    return Timed(len(tokens), answer.generation_tokens, first - began, ended - first, "".join(texts))


def _main() -> None:
    from mlx_lm import load

    model, tokenizer, *_ = load(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_generate(model, tokenizer, request["prompt"], request["max_tokens"])), flush=True)


if __name__ == "__main__":
    _main()
