"""Guided decoding of a tool call: sixteen tools, a vocabulary of 151,936 tokens (Qwen's size).

    python -m benchmarks.guided [--json]

The time to the first mask and the time per mask while a call is written. The vocabulary is made here (bytes and random words);
outlines 0.2.3 took 131 s to compile the same on the same kind of machine (docs/architecture.md).
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.row import Row, show, spread, within
from mlx_launcher.host.guided import Guides, tool_call_grammar
from mlx_launcher.host.requests import Tool

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tools import TOOLS

VOCABULARY = 151_936
CALL = {
    "name": "plan_work",
    "arguments": {"items": [{"content": f"Step {number} of the work", "status": "pending"} for number in range(20)]},
}


def tokenizer() -> PreTrainedTokenizerFast:
    chance = random.Random(0)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(names)}
    while len(vocabulary) < VOCABULARY - 1:
        word = "".join(chance.choices('etaoinshrdlucmfwypvbgkjqxz_/.{}":,ĠĊ', k=chance.randint(2, 9)))
        vocabulary.setdefault(word, len(vocabulary))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"eos_token": "<|end|>"})
    return made


def measure() -> list[Row]:
    words = tokenizer()
    process = psutil.Process()
    before = process.memory_info().rss
    tools = [Tool(tool["function"]["name"], tool["function"]["parameters"]) for tool in TOOLS]
    logits = mx.zeros((1, VOCABULARY))
    nothing = mx.zeros((1, 0))

    began = time.perf_counter()
    guides = Guides(words)
    mx.eval(guides.matcher(tool_call_grammar(tools))(input_ids=nothing, logits=logits))
    once = time.perf_counter() - began
    firsts, masks = [], []
    tokens = words.encode(json.dumps(CALL), add_special_tokens=False)
    for _ in range(10):
        began = time.perf_counter()
        matcher = guides.matcher(tool_call_grammar(tools))
        matcher.fill()
        firsts.append((time.perf_counter() - began) * 1000)
        for token in tokens:
            if not matcher.consume([token]):
                raise SystemExit(f"the grammar refuses {words.decode([token])!r}")
            began = time.perf_counter()
            matcher.fill()
            masks.append((time.perf_counter() - began) * 1000)
    megabytes = (process.memory_info().rss - before) / 1e6
    what = f"{len(TOOLS)} tools, {VOCABULARY:,} tokens, a call of {len(tokens)} tokens, 10 times"
    about = f"{what}; once for a model {once * 1000:.0f} ms and {megabytes:.0f} MB"
    return [
        _row("guided decoding, request to first mask", 50.0, firsts, about),
        _row("guided decoding, a mask", 0.2, masks, what),
    ]


def _row(measure: str, goal_ms: float, values: list[float], what: str) -> Row:
    median = statistics.median(values)
    detail = f"{median:.3g} ms ({spread(values)}), {what}"
    return within(measure, "–", goal_ms, "ms", median, median / goal_ms, detail)


if __name__ == "__main__":
    show(measure())
