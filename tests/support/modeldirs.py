"""Model directories that are whole to the eye: a configuration, a tokenizer's file and a header; the data is a hole."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "U32": 4}
ONE_TENSOR: Tensors = {"model.norm.weight": ("F16", (64,))}


def model_directory(path: Path, config: dict[str, Any], tensors: Tensors = ONE_TENSOR) -> Path:
    """Makes a directory with `tensors` (name to type and shape), which take no room on the disk, however large."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    write_weights(path / "model.safetensors", tensors)
    return path


def write_weights(file: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + end)
