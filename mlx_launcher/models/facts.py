"""What a model is and needs, from its config.json and the headers of its weights alone, and which backend serves it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.architectures import (
    PLAIN,
    Architecture,
    architecture,
    defaults,
    mlx_lm_is_installed,
    states_of_mlx_lm,
)
from mlx_launcher.models.directory import BrokenModelError, check, read_config, weight_files
from mlx_launcher.models.safetensors import TornFileError, read_header

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # type and shape by name
Cache = Literal["plain", "sliding", "hybrid", "unknown"]
TEXTGEN = "mlx-textgen"
LEGACY = "mlx-legacy"  # mlx-lm's own server

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_WINDOWS = {"RotatingKVCache", "ChunkedKVCache"}
# Where models with several parts keep the numbers of the one that writes text.
_TEXT_PARTS = ("text_config", "language_config", "llm_config")
# Of what a configuration may leave out to mlx-lm, that which says how much a layer keeps: Gemma 3's does.
_LEFT_OUT = (
    *("head_dim", "global_head_dim", "index_head_dim", "num_kv_shared_layers"),
    *("sliding_window", "sliding_window_pattern", "full_attention_interval"),
)
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_attention_groups")
# As `layer_types` calls a layer that keeps every token; the shorter is that of models with Mamba's layers.
WHOLE_ATTENTION = ("full_attention", "attention")


@dataclass(frozen=True)
class Quantization:
    """How weights are packed. `mode` is "affine" for MLX's own scheme, else its name: "mxfp4", "nvfp4", "awq"."""

    bits: int | None
    group_size: int | None
    mode: str
    mixed: bool = False  # some layers have other bits

    def __str__(self) -> str:
        if self.mode != "affine" or self.bits is None:
            return self.mode
        return f"{self.bits} bit{', mixed' if self.mixed else ''}"


@dataclass(frozen=True)
class Facts:
    """None where the files do not tell."""

    path: Path
    architecture: str  # `model_type` of config.json
    known: bool  # whether the installed mlx-lm has it; taken as true where there is no mlx-lm to ask
    cache: Cache
    states: tuple[str, ...]  # the classes other than plain keys and values in which layers keep what they have read
    quantization: Quantization | None
    dtype: str  # of what is not packed, and of the keys and values
    weight_bytes: int
    parameters: int | None
    context: int | None  # tokens
    layers: int | None
    kv_bytes_per_token: int | None  # over the layers whose state grows with every token


def facts(path: Path) -> Facts:
    """What the whole model at `path` is; raises BrokenModelError for one that is not whole."""
    weight_bytes = check(path)
    config = read_config(path)
    text = text_part(config)
    tensors = read_tensors(path)
    loaded_by = architecture(config)
    cache, states = cache_kind(text, loaded_by)
    layers = number(text, *LAYERS)
    dtype = weights_dtype(tensors, text)
    return Facts(
        path=path,
        architecture=config["model_type"],
        known=loaded_by is not None or not mlx_lm_is_installed(),
        cache=cache,
        states=states,
        quantization=_quantization(config),
        dtype=dtype,
        weight_bytes=weight_bytes,
        parameters=_parameters(tensors, config),
        context=context_length(config),
        layers=layers,
        kv_bytes_per_token=_kv_bytes(text, loaded_by, cache, layers, dtype),
    )


def serves(model: Facts) -> str | None:
    """The backend that serves it, None where none does. What the source does not tell is left to the host to find out.

    mlx-textgen keeps states on disk, and so serves those that mlx-lm can write and read: not a family's own.
    """
    if not model.known:
        return None
    return TEXTGEN if set(model.states) <= states_of_mlx_lm() else LEGACY


def refuse_unknown(model: Facts) -> None:
    """LaunchError `architecture_unsupported` for what no backend here can serve."""
    if not model.known:
        raise unknown(f"{model.architecture} of {model.path}")


def unknown(what: str) -> LaunchError:
    """LaunchError `architecture_unsupported` for the name of an architecture."""
    return LaunchError(
        "architecture_unsupported",
        f"the architecture {what} is none that the installed mlx-lm can load",
        "Choose a model of another family, or look for a newer release of mlx-launch",
    )


def refuse_unserved(model: Facts) -> None:
    """LaunchError `architecture_unsupported` for what mlx-textgen cannot serve, with what can."""
    refuse_unknown(model)
    if (reason := why_not_textgen(model)) is not None:
        hint = "Serve it with --mode=mlx-legacy, or choose a model of another family"
        raise LaunchError("architecture_unsupported", reason, hint)


def why_not_textgen(model: Facts) -> str | None:
    """Why mlx-textgen cannot serve a model that mlx-lm knows; None where it can."""
    if not model.known or serves(model) == TEXTGEN:
        return None
    own = ", ".join(sorted(set(model.states) - states_of_mlx_lm()))
    return f"the architecture {model.architecture} of {model.path} keeps its state in {own}, which mlx-textgen cannot serve"


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the part that writes text, and what mlx-lm takes where it says nothing of a layer's state."""
    parts = [part for name in _TEXT_PARTS if isinstance(part := config.get(name), dict)]
    said = {**config, **(parts[0] if parts else {})}
    taken = defaults(said)
    return {**{name: taken[name] for name in _LEFT_OUT if name in taken}, **said}


def number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of the keys that holds a positive whole number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model was made for, at most, by its config.json."""
    return number(
        text_part(config),
        *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"),
    )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model tells apart, by its config.json."""
    return number(text_part(config), "vocab_size")


def read_tensors(path: Path) -> Tensors:
    """Type and shape of every tensor."""
    found: Tensors = {}
    for file in weight_files(path):
        try:
            header = read_header(file)
        except (TornFileError, OSError) as error:
            raise BrokenModelError(str(error)) from None
        found.update((name, (tensor["dtype"], tuple(tensor["shape"]))) for name, tensor in header.items())
    return found


def weights_dtype(tensors: Tensors, config: Mapping[str, Any]) -> str:
    sizes: Counter[str] = Counter()
    for dtype, shape in tensors.values():
        if dtype in _DTYPES:
            sizes[_DTYPES[dtype]] += math.prod(shape)
    if sizes:
        return sizes.most_common(1)[0][0]
    named = config.get("torch_dtype") or config.get("dtype")
    return named if isinstance(named, str) and named in DTYPE_BYTES else "float16"


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    given = config.get("quantization") or config.get("quantization_config")
    if not isinstance(given, dict):
        return None
    bits = number(given, "bits")
    mode = given.get("mode") or given.get("quant_method") or "affine"
    others = {number(layer, "bits") for layer in given.values() if isinstance(layer, dict)} - {None, bits}
    return Quantization(bits, number(given, "group_size"), str(mode), bool(bits and others))


def _parameters(tensors: Tensors, config: Mapping[str, Any]) -> int | None:
    """Packed weights count as what they unpack to: as many as their scales, times the group that shares one."""
    given = config.get("quantization") or config.get("quantization_config")
    packing: dict[str, Any] = given if isinstance(given, dict) else {}
    total = 0
    for name, (_, shape) in tensors.items():
        layer, _, part = name.rpartition(".")
        scales = tensors.get(f"{layer}.scales")
        if scales is None:
            total += math.prod(shape)
        elif part == "weight":
            own = packing.get(layer)
            group = number(own if isinstance(own, dict) else {}, "group_size") or number(packing, "group_size")
            if group is None:
                return None
            total += math.prod(scales[1]) * group
    return total


def cache_kind(config: Mapping[str, Any], loaded_by: Architecture | None) -> tuple[Cache, tuple[str, ...]]:
    if loaded_by is None or not loaded_by.states:
        return "unknown", ()
    states = loaded_by.states - {PLAIN}
    if states and states <= _WINDOWS and not _slides(config, loaded_by):
        states = frozenset()
    kind: Cache = "plain" if not states else "sliding" if states <= _WINDOWS else "hybrid"
    return kind, tuple(sorted(states))


def _slides(config: Mapping[str, Any], loaded_by: Architecture) -> bool:
    """Whether any layer of a model that may have a window has one."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return any(kind != "full_attention" for kind in kinds)
    if "sliding_window" in config and config["sliding_window"] is None:
        return False
    return not loaded_by.full_attention_by_default


def _kv_bytes(
    config: Mapping[str, Any], loaded_by: Architecture | None, cache: Cache, layers: int | None, dtype: str
) -> int | None:
    width = kv_width(config, loaded_by)
    if width is None or layers is None:
        return None
    return _growing_layers(config, cache, layers) * width * DTYPE_BYTES[dtype]


def kv_width(config: Mapping[str, Any], loaded_by: Architecture | None, windowed: bool = False) -> int | None:
    """How many numbers one layer keeps of one token; `windowed` one that keeps the last tokens alone."""
    heads = number(config, "num_attention_heads", "n_heads", "n_head")
    rope = number(config, "qk_rope_head_dim")
    if rope and (rank := number(config, "kv_lora_rank")):
        if loaded_by is not None and loaded_by.latent:
            # DeepSeek's sparse attention has an index beside, which mlx-lm keeps twice; else two caches are two attentions.
            index = number(config, "index_head_dim") or 0
            return (rank + rope) * (2 if "CacheList" in loaded_by.states and not index else 1) + 2 * index
        nope, value = number(config, "qk_nope_head_dim"), number(config, "v_head_dim")
        if heads and nope and value:
            return heads * (nope + rope + value)
    hidden = number(config, "hidden_size", "n_embd", "d_model", "dim")
    size = number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    kv_heads = number(config, *KV_HEADS) or heads
    if not windowed:  # Gemma 4's other layers have heads of their own
        size = number(config, "global_head_dim") or size
        kv_heads = (
            number(config, "num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        ) or kv_heads
    return 2 * kv_heads * size if kv_heads and size else None


def _growing_layers(config: Mapping[str, Any], cache: Cache, layers: int) -> int:
    """The layers that keep every token: the others keep a window, a state of one size, or nothing of their own."""
    own = max(0, layers - (number(config, "num_kv_shared_layers") or 0))
    if cache in ("plain", "unknown"):
        return own
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return sum(kind in WHOLE_ATTENTION for kind in kinds[:own])
    every = number(config, "full_attention_interval", "sliding_window_pattern")
    return own // every if every else own
