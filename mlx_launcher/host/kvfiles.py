"""What of a model's state goes into a file of the KV cache, and back."""

import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import KVCache

from mlx_launcher.kvcache.files import Tensor
from mlx_launcher.kvcache.tree import Segment

State = list[Any]  # mlx-lm's caches, one for each layer

_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.int16: "I16",
    mx.int8: "I8",
    mx.uint64: "U64",
    mx.uint32: "U32",
    mx.uint16: "U16",
    mx.uint8: "U8",
    mx.bool_: "BOOL",
}


def is_plain(state: State) -> bool:
    """Whether any prefix can be had from a state later: else it has to be copied at the point that the next turn starts from."""
    return all(type(layer) is KVCache for layer in state)


def state_bytes(state: State) -> int:
    """What a state takes in memory."""
    return sum(
        array.nbytes for _, array in tree_flatten([layer.state for layer in state]) if isinstance(array, mx.array)
    )


def plain_tensors(state: State, start: int, end: int) -> Iterator[Tensor]:
    """The keys and values of the tokens from `start` to `end` of a plain state."""
    for number, layer in enumerate(state):
        yield _tensor(f"{number}.keys", layer.keys[..., start:end, :])
        yield _tensor(f"{number}.values", layer.values[..., start:end, :])


def plain_state(layers: int, line: list[Segment], usable: int) -> State:
    """The first `usable` tokens of what a line of segments holds. Raises what `mx.load` does, and KeyError, for damaged files."""
    parts: list[tuple[Any, int]] = []
    for segment, following in zip(line, [*line[1:], None], strict=True):
        end = min(following.start if following else usable, usable)
        if end > segment.start:
            parts.append((mx.load(str(segment.path)), end - segment.start))
    state: State = []
    for number in range(layers):
        layer = KVCache()
        layer.keys, layer.values = (
            mx.concatenate([arrays[f"{number}.{name}"][..., :count, :] for arrays, count in parts], axis=2)
            for name in ("keys", "values")
        )
        layer.offset = layer.keys.shape[2]
        if layer.offset != usable:
            raise ValueError(f"layer {number} has {layer.offset} tokens, not {usable}")
        state.append(layer)
    return state


def whole_tensors(state: State) -> tuple[list[Tensor], dict[str, str]]:
    """All of a state of any kind, and what besides arrays is needed to make it again."""
    tensors, values = [], {}
    for name, value in tree_flatten([layer.state for layer in state]):
        if isinstance(value, mx.array):
            tensors.append(_tensor(name, value))
        else:
            values[name] = value
    return tensors, {"classes": json.dumps([type(layer).__name__ for layer in state]), "values": json.dumps(values)}


def whole_state(segment: Segment) -> State:
    """A state of any kind. Raises as `plain_state`."""
    loaded: Any = mx.load(str(segment.path), return_metadata=True)
    arrays, metadata = loaded
    leaves = {**arrays, **json.loads(metadata["values"])}
    states = tree_unflatten(list(leaves.items()))
    return [
        getattr(caches, name).from_state(inner)
        for name, inner in zip(json.loads(metadata["classes"]), states, strict=True)
    ]


def _tensor(name: str, array: mx.array) -> Tensor:
    if not array.size:
        return Tensor(name, _DTYPES[array.dtype], tuple(array.shape), memoryview(b""))
    # bfloat16 has no format that Python knows; as bytes it needs none.
    raw: Any = mx.contiguous(array.reshape(-1)).view(mx.uint8)
    mx.eval(raw)
    return Tensor(name, _DTYPES[array.dtype], tuple(array.shape), memoryview(raw))
