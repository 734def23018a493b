"""Guided decoding of a tool call: sixteen tools, a vocabulary of 151,936 tokens (Qwen's size).

    .venv/bin/python benchmarks/guided.py

Prints the time to the first mask, the time per mask while a call is written, and the memory it takes. The vocabulary is made
here (bytes and random words); outlines 0.2.3 took 131 s to compile the same on the same kind of machine (docs/architecture.md).
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


def main() -> None:
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
    firsts, masks, whole = [], [], []
    tokens = words.encode(json.dumps(CALL), add_special_tokens=False)
    for _ in range(10):
        began = time.perf_counter()
        matcher = guides.matcher(tool_call_grammar(tools))
        matcher.fill()
        firsts.append(time.perf_counter() - began)
        for token in tokens:
            if not matcher.consume([token]):
                raise SystemExit(f"the grammar refuses {words.decode([token])!r}")
            began = time.perf_counter()
            matcher.fill()
            masks.append(time.perf_counter() - began)
            began = time.perf_counter()
            mx.eval(matcher(input_ids=nothing, logits=logits))
            whole.append(time.perf_counter() - began)
    megabytes = (process.memory_info().rss - before) / 1e6
    cuts = statistics.quantiles(masks, n=100)
    sys.stdout.write(
        f"{len(TOOLS)} tools, {VOCABULARY} tokens, a call of {len(tokens)} tokens, 10 times\n"
        f"tokenizer converted, once per model      {once * 1000:8.1f} ms\n"
        f"request to first mask                    {statistics.median(firsts) * 1000:8.1f} ms (goal 50)\n"
        f"mask, median                             {cuts[49] * 1000:8.3f} ms (goal 0.2)\n"
        f"mask, 99th percentile                    {cuts[98] * 1000:8.3f} ms\n"
        f"mask put on the logits, median           {statistics.median(whole) * 1000:8.3f} ms\n"
        f"memory                                   {megabytes:8.0f} MB\n"
    )


if __name__ == "__main__":
    main()
