"""Float32 tensors as bytes, and the safetensors file that holds them: an 8-byte length, a JSON header, the bytes."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from random import Random


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    data: bytes  # float32, little endian, row by row


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The whole file. Names keep their order, so equal tensors give equal bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + len(tensor.data)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want aligned data
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())


def constant(shape: tuple[int, ...], value: float) -> Tensor:
    return Tensor(shape, struct.pack("<f", value) * math.prod(shape))


def matrix(rows: Iterable[Iterable[float]], shape: tuple[int, int]) -> Tensor:
    return Tensor(shape, struct.pack(f"<{math.prod(shape)}f", *chain.from_iterable(rows)))


def random(rng: Random, shape: tuple[int, ...], rms: float) -> Tensor:
    """Numbers of both signs whose root mean square is `rms`, to within a factor of the square root of 2.

    Sign and mantissa are random bits and the exponent is the same for all: masks over one big integer instead of a loop
    over millions of numbers. A mantissa spreads evenly over [1, 2), whose root mean square is sqrt(7/3).
    """
    count = math.prod(shape)
    exponent = round(math.log2(rms / math.sqrt(7 / 3)))
    bits = rng.getrandbits(32 * count) & _repeat(0x807FFFFF, count) | _repeat((exponent + 127) << 23, count)
    return Tensor(shape, bits.to_bytes(4 * count, "little"))


def _repeat(word: int, count: int) -> int:
    return int.from_bytes(struct.pack("<I", word) * count, "little")
