"""Tells a whole safetensors file from a torn one by its header, without reading the data.

The format: 8 bytes little-endian header length, a JSON header of `{name: {dtype, shape, data_offsets}}`, then the data.
mlx 0.31.1 loads a half-truncated file as zeros and answers garbage with status 200, so the size is compared first.
"""

import json
import struct
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000  # the reference implementation's own limit


class TornFileError(ValueError):
    """A safetensors file that is not whole; the message names the file and what is wrong with it."""


def read_header(path: Path) -> dict[str, Any]:
    """The tensors of a whole file by name, without `__metadata__`; raises TornFileError, or OSError where it cannot be read."""
    header = _read(path)
    header.pop("__metadata__", None)
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form metadata of a whole file; raises as `read_header` does."""
    return dict(_read(path).get("__metadata__", {}))


def data_start(path: Path) -> int:
    """Where the data of a file begins, in bytes."""
    with path.open("rb") as file:
        return _LENGTH.size + int(_LENGTH.unpack(file.read(_LENGTH.size))[0])


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise TornFileError(f"{path} is torn: {size} bytes is too short for a safetensors file")
        (length,) = _LENGTH.unpack(prefix)
        if length > min(_MAX_HEADER, size - _LENGTH.size):
            raise TornFileError(f"{path} is torn: its header would take {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [_end(tensor) for name, tensor in header.items() if name != "__metadata__"]
        expected = _LENGTH.size + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TornFileError(f"{path} is torn: its header is not a safetensors header") from error
    if size != expected:
        raise TornFileError(f"{path} is torn: its header promises {expected} bytes, the file has {size}")
    return dict(header)


def _end(tensor: Any) -> int:
    begin, end = tensor["data_offsets"]
    if not isinstance(tensor["dtype"], str) or not all(map(_is_count, (begin, end, *tensor["shape"]))) or begin > end:
        raise ValueError("a tensor has a type, a shape and a place")
    return int(end)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def data_bytes(path: Path) -> int:
    """Bytes of tensor data in a whole file; raises as `read_header` does."""
    return max((tensor["data_offsets"][1] for tensor in read_header(path).values()), default=0)
