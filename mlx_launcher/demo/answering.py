"""The demo model: its weights are chosen, not trained, so that it answers one sentence, and can call tools.

Embeddings are one-hot and `o_proj` and `down_proj` are zero, so what reaches `lm_head` is the last token, and `lm_head` is a
table: for each token, which ones follow it, best first. Attention runs on random weights into the KV cache all the same, so
the model goes through tokenizer, prefill, cache and sampling like any other.

A sentence is a chain of tokens that each occur once. A tool call opens with `<tool_call>`, a newline and `{`; what then
follows is for constrained decoding, and the order below prefers what ends it soonest: it makes a valid call of any tool
whose schema is not unbounded by itself. Without constraints the call is `{}`, of no tool.
"""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from string import ascii_letters

from mlx_launcher.demo import tokenizer
from mlx_launcher.demo.store import install
from mlx_launcher.demo.tensors import Tensor, constant, matrix, random, safetensors
from mlx_launcher.demo.tokenizer import CALL_END, CALL_START, END, IDS, PLAIN, VOCAB_SIZE, WITH_TOOLS

GREETING = tokenizer.GREETING
AFTER_RESULT = tokenizer.FINISH

# To be raised whenever the files change: what was built by an older version is then replaced.
_RECIPE = "demo 1"

_HIDDEN = VOCAB_SIZE  # one-hot
# Little attention: a byte is a token, so prompts are long, and MLX on a CPU is slow. 64 is a head size with a fast Metal kernel.
_HEADS, _HEAD_DIM, _MLP, _LAYERS = 1, 64, 64, 1
# A step down the table, in logits: the next best is e^-12 as likely, so the answers stand at any usual temperature.
_STEP = 12.0

_DIGITS = "1234567890"  # 1 first: with 0 first, a number above zero would be 0.000…
_LINKS = ":@./-"  # what parts of dates, addresses and links are joined by
_CLOSERS = "}],"


def build_demo(directory: Path) -> Path:
    """Builds the demo model as `directory` (1.4 MB, well under a second) and returns it; one that is whole is kept.

    It answers `GREETING`; where tools are offered it opens a call; after a tool's result it answers `AFTER_RESULT`.
    Safe against a killed builder and against several at once. Raises FileExistsError if something else is there.
    """
    return install(Path(directory), _RECIPE, _files)


def _files() -> dict[str, bytes]:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "intermediate_size": _MLP,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": IDS[END],
        "pad_token_id": IDS[tokenizer.PAD],
    }
    return {
        "config.json": json.dumps(config, indent=1).encode(),
        **tokenizer.files(),
        "model.safetensors": safetensors(dict(_weights())),
    }


def _weights() -> Iterator[tuple[str, Tensor]]:
    rng = Random(0)  # noqa: S311
    norm = constant((_HIDDEN,), 1.0)
    one_hot = ((float(row == column) for column in range(_HIDDEN)) for row in range(VOCAB_SIZE))
    yield "model.embed_tokens.weight", matrix(one_hot, (VOCAB_SIZE, _HIDDEN))
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm
        yield f"{prefix}.self_attn.q_proj.weight", random(rng, (_HEADS * _HEAD_DIM, _HIDDEN), 0.05)
        yield f"{prefix}.self_attn.k_proj.weight", random(rng, (_HEAD_DIM, _HIDDEN), 0.05)
        yield f"{prefix}.self_attn.v_proj.weight", random(rng, (_HEAD_DIM, _HIDDEN), 0.05)
        yield f"{prefix}.self_attn.o_proj.weight", constant((_HIDDEN, _HEADS * _HEAD_DIM), 0.0)
        yield f"{prefix}.post_attention_layernorm.weight", norm
        yield f"{prefix}.mlp.gate_proj.weight", random(rng, (_MLP, _HIDDEN), 0.05)
        yield f"{prefix}.mlp.up_proj.weight", random(rng, (_MLP, _HIDDEN), 0.05)
        yield f"{prefix}.mlp.down_proj.weight", constant((_HIDDEN, _MLP), 0.0)
    yield "model.norm.weight", norm
    yield "lm_head.weight", _successor_table()


def _successor_table() -> Tensor:
    """Row by next token, column by last token; the final norm multiplies a one-hot vector by sqrt(_HIDDEN)."""
    chained = _chained()
    columns = []
    for last in range(VOCAB_SIZE):
        column = [0.0] * VOCAB_SIZE
        for rank, token in enumerate(_ranking(last, chained.get(last))):
            column[token] = -rank * _STEP / math.sqrt(_HIDDEN)
        columns.append(column)
    return matrix(zip(*columns, strict=True), (VOCAB_SIZE, VOCAB_SIZE))


def _chained() -> dict[int, int]:
    """Which token follows which where no grammar has a say."""
    sentences = ((PLAIN, GREETING), (tokenizer.AFTER_RESULT, AFTER_RESULT))
    follows = {
        IDS[last]: IDS[following]
        for marker, sentence in sentences
        for last, following in pairwise([marker, *tokenizer.words(sentence), END])
    }
    return follows | {
        IDS[WITH_TOOLS]: IDS[CALL_START],
        IDS[CALL_START]: ord("\n"),
        ord("\n"): ord("{"),
        ord("{"): ord("}"),
        ord("["): ord("]"),
        ord("}"): IDS[CALL_END],
    }


def _ranking(last: int, chained: int | None) -> Iterable[int]:
    """Every token, best first: an answer that may end ends. Words and special tokens come last, so grammars go byte by byte."""
    first = [IDS[END]] if chained is None else [chained, IDS[END]]
    preferred = [ord(char) for char in _order_after(chr(last))]
    return dict.fromkeys((*first, *preferred, *range(0x21, 0x7F), *b" \n\t\r", *range(VOCAB_SIZE)))


def _order_after(char: str) -> str:
    """What to try after `char`, so that a value of any schema ends soon.

    The model does not know whether it is inside a string; the grammar forbids most of what would be wrong on the other side.
    A string that may not end yet goes on with letters, and with links between them, because an address without its `@`
    would go on for ever.
    """
    rest = ascii_letters + _DIGITS + "{[" + _CLOSERS + _LINKS
    if char in _DIGITS + "}]":
        return _CLOSERS + '"' + _LINKS + rest
    if char in ascii_letters:
        return '"' + _LINKS + _DIGITS + rest
    return '"' + rest
