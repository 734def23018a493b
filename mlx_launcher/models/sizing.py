"""What each of several hosts needs for a model, and what bounds its tokens a second: computed, nothing is loaded or run.

Tensor and pipeline are mlx-lm's two ways to spread a model (0.32: `shard` of a model, `pipeline` of its layers). The figures
leave out what a prompt takes while it is read, and the prompts that a server keeps for later.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.architectures import Architecture
from mlx_launcher.models.facts import (
    DTYPE_BYTES,
    LAYERS,
    WHOLE_ATTENTION,
    Tensors,
    cache_kind,
    context_length,
    kv_width,
    number,
    text_part,
    weights_dtype,
)
from mlx_launcher.models.splitting import Strategy

_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F16": 2,
    "BF16": 2,
    "U16": 2,
    "I16": 2,
}
_BYTES |= {"F32": 4, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8}
# As `sharded_load` of mlx-lm finds the number of a layer.
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Parts for pictures and sound, and layers that guess further tokens: mlx-lm's `sanitize` drops them.
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision\w*|visual|audio\w*|multi_modal_projector|mtp\w*)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte)\.")
# Modules that hold all experts of a layer, or one of them; one that every token goes through is a "shared_expert".
_EXPERTS = re.compile(r"\.(?:switch_mlp|experts)\.")
_EXPERTS_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)
# The modules that the families' `shard` splits by what comes out of them, bias included, and by what goes into them. What is
# not here every host keeps in whole: norms, routers, embeddings, the head.
_SPLIT_BY_OUTPUT = {"q_proj", "k_proj", "v_proj", "g_proj", "q_b_proj", "kv_b_proj", "embed_q", "unembed_out", "sinks"}
_SPLIT_BY_OUTPUT |= {"gate_proj", "up_proj", "qkv_proj", "qkvg_proj", "index_q_proj"}
_SPLIT_BY_OUTPUT |= {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "A_log", "dt_bias"}
_SPLIT_BY_INPUT = {"o_proj", "down_proj", "out_proj"}
_STATE_BYTES = 4  # mlx-lm keeps the state of a gated delta net in float32


class Weights(NamedTuple):
    """Bytes. `read` of them are read to write one token; `split` of them, `split_read` of those read, are divided among the hosts
    of a tensor-parallel group.
    """

    bytes: int = 0
    read: float = 0.0
    split: int = 0
    split_read: float = 0.0

    def plus(self, other: "Weights") -> "Weights":
        return Weights(
            self.bytes + other.bytes,
            self.read + other.read,
            self.split + other.split,
            self.split_read + other.split_read,
        )

    def among(self, hosts: int) -> "Weights":
        """What one of `hosts` of a tensor-parallel group keeps."""
        bytes_ = self.bytes - self.split + self.split // hosts
        return Weights(bytes_, self.read - self.split_read + self.split_read / hosts)


class Layer(NamedTuple):
    """`token_bytes` are kept of each token, of the last `window` where there is one; `state_bytes` of a conversation, always."""

    weights: Weights
    token_bytes: int
    window: int | None = None
    state_bytes: int = 0

    def cache_bytes(self, tokens: int) -> int:
        return self.state_bytes + self.token_bytes * min(tokens, self.window or tokens)


class Shape(NamedTuple):
    """A model as far as it matters for its size. `shared` is outside the layers: embeddings, head, the last norm.

    `uncounted`: some layers keep a state whose size the configuration does not tell in a known way.
    """

    layers: tuple[Layer, ...]
    shared: Weights
    hidden_bytes: int  # of what goes from layer to layer, for one token
    latent: bool  # keys and values are compressed into one, which every host keeps
    context: int | None
    uncounted: bool

    @property
    def weight_bytes(self) -> int:
        return self.shared.bytes + sum(layer.weights.bytes for layer in self.layers)


class Host(NamedTuple):
    """One host's share in bytes; `layers` are those it runs. `read_bytes` is what it reads of its memory to write one token."""

    layers: range
    weight_bytes: int
    cache_bytes: int
    read_bytes: float

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


class Sized(NamedTuple):
    """`read_bytes`, `sent_bytes` and `steps` are of one token: what is read of memory, what passes the link and in how many
    messages, counting only what has to wait for what came before it.
    """

    strategy: Strategy
    hosts: tuple[Host, ...]
    read_bytes: float
    sent_bytes: float
    steps: int


class Speed(NamedTuple):
    """Upper bounds for one conversation; None where a rate that they rest on was not given."""

    memory_s: float | None  # of one token
    link_s: float | None
    tokens_per_s: float | None
    bound_by: Literal["memory", "link"] | None


def shape(config: Mapping[str, Any], tensors: Tensors, loaded_by: Architecture | None) -> Shape:
    """LaunchError `model_unsupported` for a model whose configuration does not tell its layers, or the width of one."""
    text = text_part(config)
    count = number(text, *LAYERS)
    width, hidden = kv_width(text, loaded_by), number(text, "hidden_size", "n_embd", "d_model", "dim")
    if count is None or width is None or hidden is None:
        what = (
            f"config.json of a {config.get('model_type')} does not tell its layers and their width in a way known here"
        )
        raise LaunchError("model_unsupported", what, "Start it and see what status says of its memory")
    kind, _ = cache_kind(text, loaded_by)
    element = DTYPE_BYTES[weights_dtype(tensors, text)]
    weights = _weights(text, tensors, count)
    kept = [_keeps(text, kind, index, count) for index in range(count)]
    state = _state_bytes(text, element)
    window = number(text, "sliding_window", "attention_chunk_size")
    made = {
        "all": (width * element, None, 0),
        "window": ((kv_width(text, loaded_by, windowed=True) or width) * element, window, 0),
        "state": (0, None, state or 0),
        "nothing": (0, None, 0),
    }
    return Shape(
        layers=tuple(Layer(weights[index], *made[kept[index]]) for index in range(count)),
        shared=weights[None],
        hidden_bytes=hidden * element,
        latent=loaded_by is not None and loaded_by.latent and bool(number(text, "kv_lora_rank")),
        context=context_length(text),
        uncounted="state" in kept and state is None,
    )


def size(model: Shape, strategy: Strategy, hosts: int, tokens: int, conversations: int) -> Sized:
    """For `conversations` of `tokens` tokens each. What is read and sent is for the next token of one of them."""
    if strategy == "pipeline":
        return _pipeline(model, hosts, tokens, conversations)
    weights = model.shared
    for layer in model.layers:
        weights = weights.plus(layer.weights)
    mine = weights.among(hosts)
    whole = sum(layer.cache_bytes(tokens) for layer in model.layers)
    cache = whole // (1 if model.latent else hosts)
    read = mine.read + cache
    host = Host(range(len(model.layers)), mine.bytes, cache * conversations, read)
    # A ring adds up in twice (hosts - 1) steps, each of a host's share; after the attention and after the MLP of each layer.
    sums, steps = 2 * len(model.layers), 2 * (hosts - 1)
    return Sized(strategy, (host,) * hosts, read, sums * steps / hosts * model.hidden_bytes, sums * steps)


def _pipeline(model: Shape, hosts: int, tokens: int, conversations: int) -> Sized:
    """Layers as `PipelineMixin` deals them out: rank 0 has the last ones, and low ranks those that are left over."""
    base, extra = divmod(len(model.layers), hosts)
    found: list[Host] = []
    end = len(model.layers)
    for rank in range(hosts):
        begin = end - base - (rank < extra)
        own = model.layers[begin:end]
        cache = sum(layer.cache_bytes(tokens) for layer in own)
        weights = model.shared.bytes + sum(layer.weights.bytes for layer in own)
        read = model.shared.read + sum(layer.weights.read for layer in own) + cache
        found.append(Host(range(begin, end), weights, cache * conversations, read))
        end = begin
    # One host after the other runs its layers; then all have what came out, and read the head at the same time.
    read = sum(host.read_bytes for host in found) - (hosts - 1) * model.shared.read
    steps = 2 * (hosts - 1)  # from one to the next, and to all
    return Sized("pipeline", tuple(found), read, steps * model.hidden_bytes, steps)


def speed(sized: Sized, memory_rate: float | None, link_rate: float | None, latency_s: float | None) -> Speed:
    """Rates in bytes a second, `latency_s` of one message; without a latency the link's time is that of the bytes alone."""
    memory = sized.read_bytes / memory_rate if memory_rate else None
    link: float | None = 0.0 if sized.strategy == "single" else None
    if link is None and link_rate:
        link = sized.sent_bytes / link_rate + sized.steps * (latency_s or 0.0)
    if memory is None or link is None:
        return Speed(memory, link, None, None)
    return Speed(memory, link, 1 / (memory + link), "memory" if memory >= link else "link")


def _weights(config: Mapping[str, Any], tensors: Tensors, layers: int) -> dict[int | None, Weights]:
    """By the number of the layer; None is what is in none. What mlx-lm does not keep is left out."""
    found: dict[int | None, Weights] = {None: Weights(), **{index: Weights() for index in range(layers)}}
    experts = number(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = number(config, *_EXPERTS_CHOSEN)
    part = min(chosen / experts, 1.0) if experts and chosen else 1.0
    tied = not any("lm_head" in name for name in tensors)
    for name, (dtype, dims) in tensors.items():
        if dtype not in _BYTES:
            raise LaunchError("model_unsupported", f"{name} is of type {dtype}, whose size is not known here")
        match = _LAYER.search(name)
        index = int(match[1]) if match else None
        if index not in found or _NOT_TEXT.search(name):
            continue
        bytes_ = _BYTES[dtype] * math.prod(dims)
        read = bytes_ * (part if _EXPERTS.search(name) else 1.0)
        if not tied and _EMBEDDING.search(name):
            read = 0.0  # one row of it
        split = index is not None and _is_split(name)
        found[index] = found[index].plus(Weights(bytes_, read, bytes_ if split else 0, read if split else 0.0))
    return found


def _is_split(name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    module = module.rpartition(".")[2]
    if parameter in _SPLIT_BY_OUTPUT or module in _SPLIT_BY_OUTPUT:
        return True
    return module in _SPLIT_BY_INPUT and parameter != "bias"


def _keeps(
    config: Mapping[str, Any], kind: str, index: int, layers: int
) -> Literal["all", "window", "state", "nothing"]:
    """What a layer keeps of what it has read: all tokens, a window of them, a state of one size, or nothing of its own."""
    if index >= layers - (number(config, "num_kv_shared_layers") or 0):
        return "nothing"
    if kind in ("plain", "unknown"):
        return "all"
    kinds: Sequence[Any] = config.get("layer_types") or ()
    if isinstance(kinds, list) and index < len(kinds):
        if kinds[index] in WHOLE_ATTENTION:
            return "all"
        return "window" if kind == "sliding" or "sliding" in str(kinds[index]) else "state"
    every = number(config, "full_attention_interval", "sliding_window_pattern")
    if every is None or (index + 1) % every == 0:
        return "all"
    return "window" if kind == "sliding" else "state"


def _state_bytes(config: Mapping[str, Any], element: int) -> int | None:
    """Of a gated delta net (Qwen3-Next and its kin) for one conversation: the tail of its convolution, and its state."""
    value_heads, key_heads = number(config, "linear_num_value_heads"), number(config, "linear_num_key_heads")
    keys, values = number(config, "linear_key_head_dim"), number(config, "linear_value_head_dim")
    kernel = number(config, "linear_conv_kernel_dim")
    if not (value_heads and key_heads and keys and values and kernel):
        return None
    tail = (kernel - 1) * (2 * key_heads * keys + value_heads * values)
    return tail * element + value_heads * values * keys * _STATE_BYTES
