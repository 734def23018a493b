"""Random models of each family that mlx-lm builds differently: their text depends on the whole prompt, so a wrong cache shows.

The layouts are those that mlx-lm 0.32 saves (`mlx_lm/models/<family>.py`, after its `sanitize`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from mlx_launcher.demo import tokenizer
from mlx_launcher.demo.store import install
from mlx_launcher.demo.tensors import Tensor, constant, random, safetensors
from mlx_launcher.demo.tokenizer import END, IDS, PAD, VOCAB_SIZE

# To be raised whenever the files change: what was built by an older version is then replaced.
_RECIPE = "random 2"

_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 128, 4, 4, 2, 32, 256
_EXPERTS, _EXPERT_MLP = 4, 128
_WINDOW = 32  # of the sliding layers; small, so that a test exceeds it with one sentence

# Queries and keys so large that a head looks at a few tokens: the mean of all would be much the same for all prompts.
_SHARPNESS = 2.0
# Layers outweigh the embedding of the last token, which else decides the next one alone.
_EMBEDDING_RMS = 0.5


@dataclass(frozen=True)
class _Family:
    """How a family differs from llama."""

    config: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    sinks: bool = False  # and a bias on `o_proj`
    qk_norm: float | None = None
    gated: bool = False  # `q_proj` holds a gate too
    norm: float = 1.0  # what a weight is where the norm leaves its input's scale alone
    sandwich: bool = False  # norms after the attention and the MLP as well as before
    experts: str = ""  # where the experts are, "" for an MLP
    shared_expert: bool = False
    linear_every: int = 0  # every so manieth layer is attention, the others are linear


_MOE = {
    "num_experts": _EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": _EXPERT_MLP,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_FAMILIES = {
    "llama": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=_SHARPNESS),
    "qwen3_moe": _Family(_MOE, qk_norm=_SHARPNESS, experts="switch_mlp"),
    "gpt_oss": _Family(
        {
            "num_local_experts": _EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": _EXPERT_MLP,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
            # Not read by mlx-lm; without it transformers warns about its own default.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        qkv_bias=True,
        sinks=True,
        experts="experts",
    ),
    # Its norms multiply by 1 + weight, and it multiplies embeddings by sqrt(hidden).
    "gemma3_text": _Family(
        {"sliding_window": _WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": _HEAD_DIM},
        qk_norm=_SHARPNESS - 1,
        norm=0.0,
        sandwich=True,
    ),
    "qwen3_next": _Family(
        _MOE
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": _EXPERT_MLP,
            "partial_rotary_factor": 0.5,
            "full_attention_interval": 2,
        },
        qk_norm=_SHARPNESS,
        gated=True,
        experts="switch_mlp",
        shared_expert=True,
        linear_every=2,
    ),
}
FAMILIES = tuple(_FAMILIES)


def build_random(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Builds a model of `family` (one of `FAMILIES`) with random weights as `directory`, and returns it; a whole one is kept.

    About 11 MB and a tenth of a second. A greedy answer is printable ASCII, never ends by itself, and differs with any
    part of the prompt; the same family and seed give the same bytes. On a CPU, a prefill of 2,000 tokens costs over 100
    times what decoding 8 does (llama, measured on two Linux cores, where MLX is slow: 5.5 to 7 s against 0.04 s).
    Raises KeyError for a family it does not know, FileExistsError if something else is at `directory`.
    """
    shape = _FAMILIES[family]
    return install(Path(directory), f"{_RECIPE} {family} {seed}", lambda: _files(family, shape, seed))


def _files(name: str, family: _Family, seed: int) -> dict[str, bytes]:
    config = {
        "model_type": name,
        "hidden_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "intermediate_size": _MLP,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": IDS[END],
        "pad_token_id": IDS[PAD],
        **family.config,
    }
    weights = _Weights(family, seed)
    weights.write()
    return {
        "config.json": json.dumps(config, indent=1).encode(),
        **tokenizer.files(),
        "model.safetensors": safetensors(weights.tensors),
    }


class _Weights:
    def __init__(self, family: _Family, seed: int) -> None:
        self.family = family
        self.rng = Random(seed)  # noqa: S311
        self.tensors: dict[str, Tensor] = {}

    def write(self) -> None:
        rms = _EMBEDDING_RMS / math.sqrt(_HIDDEN) if self.family.sandwich else _EMBEDDING_RMS
        self.tensors["model.embed_tokens.weight"] = random(self.rng, (VOCAB_SIZE, _HIDDEN), rms)
        for index in range(_LAYERS):
            self._layer(index, f"model.layers.{index}")
        self._norm("model.norm")
        self._head()

    def _layer(self, index: int, layer: str) -> None:
        family = self.family
        self._norm(f"{layer}.input_layernorm")
        if family.linear_every and (index + 1) % family.linear_every:
            self._delta_net(f"{layer}.linear_attn")
        else:
            self._attention(f"{layer}.self_attn")
        self._norm(f"{layer}.post_attention_layernorm")
        if family.sandwich:
            self._norm(f"{layer}.pre_feedforward_layernorm")
            self._norm(f"{layer}.post_feedforward_layernorm")
        if family.experts:
            self._experts(f"{layer}.mlp")
        else:
            self._mlp(f"{layer}.mlp", _MLP)

    def _attention(self, name: str) -> None:
        family = self.family
        heads, kv = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
        self._linear(f"{name}.q_proj", (heads * (2 if family.gated else 1), _HIDDEN), _SHARPNESS, family.qkv_bias)
        self._linear(f"{name}.k_proj", (kv, _HIDDEN), _SHARPNESS, family.qkv_bias)
        self._linear(f"{name}.v_proj", (kv, _HIDDEN), bias=family.qkv_bias)
        self._linear(f"{name}.o_proj", (_HIDDEN, heads), 2.0, family.sinks)
        if family.sinks:
            self.tensors[f"{name}.sinks"] = random(self.rng, (_HEADS,), 1.0)
        if family.qk_norm is not None:
            self.tensors[f"{name}.q_norm.weight"] = constant((_HEAD_DIM,), family.qk_norm)
            self.tensors[f"{name}.k_norm.weight"] = constant((_HEAD_DIM,), family.qk_norm)

    def _delta_net(self, name: str) -> None:
        config = self.family.config
        value_heads, value_dim = config["linear_num_value_heads"], config["linear_value_head_dim"]
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = value_heads * value_dim
        self.tensors[f"{name}.conv1d.weight"] = random(
            self.rng, (2 * keys + values, config["linear_conv_kernel_dim"], 1), 0.5
        )
        self._linear(f"{name}.in_proj_qkvz", (2 * keys + 2 * values, _HIDDEN))
        self._linear(f"{name}.in_proj_ba", (2 * value_heads, _HIDDEN))
        self.tensors[f"{name}.dt_bias"] = constant((value_heads,), 0.0)
        # The state halves in about a hundred tokens: exp(-exp(-4.6) * softplus(0)) a token.
        self.tensors[f"{name}.A_log"] = constant((value_heads,), -4.6)
        self.tensors[f"{name}.norm.weight"] = constant((value_dim,), 1.0)
        self._linear(f"{name}.out_proj", (_HIDDEN, values), 2.0)

    def _experts(self, name: str) -> None:
        bias = self.family.sinks
        self._linear(f"{name}.{'router' if bias else 'gate'}", (_EXPERTS, _HIDDEN), 2.0, bias)
        self._mlp(f"{name}.{self.family.experts}", _EXPERT_MLP, (_EXPERTS,), bias)
        if self.family.shared_expert:
            self._mlp(f"{name}.shared_expert", _EXPERT_MLP)
            self._linear(f"{name}.shared_expert_gate", (1, _HIDDEN))

    def _mlp(self, name: str, width: int, stack: tuple[int, ...] = (), bias: bool = False) -> None:
        self._linear(f"{name}.gate_proj", (*stack, width, _HIDDEN), bias=bias)
        self._linear(f"{name}.up_proj", (*stack, width, _HIDDEN), bias=bias)
        self._linear(f"{name}.down_proj", (*stack, _HIDDEN, width), 2.0, bias)

    def _linear(self, name: str, shape: tuple[int, ...], gain: float = 1.0, bias: bool = False) -> None:
        """A matrix, or a stack of them, that makes a vector `gain` times as long for its number of elements."""
        self.tensors[f"{name}.weight"] = random(self.rng, shape, gain / math.sqrt(shape[-1]))
        if bias:
            self.tensors[f"{name}.bias"] = random(self.rng, shape[:-1], 0.1)

    def _norm(self, name: str) -> None:
        self.tensors[f"{name}.weight"] = constant((_HIDDEN,), self.family.norm)

    def _head(self) -> None:
        """Only printable ASCII gets a row: tests can compare texts, and no answer ends because of a random `<|im_end|>`."""
        row = 4 * _HIDDEN
        data = bytearray(row * VOCAB_SIZE)
        printable = range(0x20, 0x7F)
        rows = random(self.rng, (len(printable), _HIDDEN), 2.0 / math.sqrt(_HIDDEN)).data
        data[row * printable.start : row * printable.stop] = rows
        self.tensors["lm_head.weight"] = Tensor((VOCAB_SIZE, _HIDDEN), bytes(data))
