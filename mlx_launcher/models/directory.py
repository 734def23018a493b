"""Checks a model directory without loading it."""

import json
import os
from pathlib import Path
from typing import Any

from mlx_launcher.models.safetensors import TornFileError, data_bytes

_AGAIN = "Download the model again."
_END_BYTES = 64


class BrokenModelError(Exception):
    """A directory that no server can load: `reason` names the file, `hint` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the model directory `path`; raises BrokenModelError."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise BrokenModelError(f"{path} has no config.json", "Name the directory of an MLX model.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModelError(f"{file} cannot be read: {error}", _AGAIN) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BrokenModelError(f"{file} names no model_type", _AGAIN)
    return config


def weight_files(path: Path) -> list[Path]:
    """The files that mlx-lm loads weights from."""
    return sorted(path.glob("model*.safetensors"))


def check(path: Path) -> int:
    """Bytes of weights, if every file that a server needs is there and whole; raises BrokenModelError."""
    read_config(path)
    _check_tokenizer(path)
    weights = weight_files(path)
    if not weights:
        raise BrokenModelError(f"{path} has no model*.safetensors", _AGAIN)
    if missing := _indexed(path) - {file.name for file in weights}:
        raise BrokenModelError(f"{path} lacks {', '.join(sorted(missing))}", _AGAIN)
    try:
        return sum(data_bytes(file) for file in weights)
    except (TornFileError, OSError) as error:
        raise BrokenModelError(str(error), _AGAIN) from None


def _check_tokenizer(path: Path) -> None:
    """Of tokenizer.json only the end is looked at: to parse 26 MB takes half a second, and this runs at every start."""
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    if not file.is_file():
        raise BrokenModelError(f"{path} has no tokenizer.json", _AGAIN)
    try:
        if not _end_of(file).rstrip().endswith(b"}"):
            raise BrokenModelError(f"{file} is torn: it does not end as JSON does", _AGAIN)
    except OSError as error:
        raise BrokenModelError(f"{file} cannot be read: {error}", _AGAIN) from None
    try:
        json.loads(config.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModelError(f"{config} cannot be read: {error}", _AGAIN) from None


def _end_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(-min(_END_BYTES, file.stat().st_size), os.SEEK_END)
        return opened.read()


def _indexed(path: Path) -> set[str]:
    index = path / "model.safetensors.index.json"
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenModelError(f"{index} cannot be read", _AGAIN) from None
