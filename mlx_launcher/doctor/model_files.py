"""What keeps a model from starting although every file is there: its texts read whole, its numbers held against its weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_launcher.models.directory import read_config
from mlx_launcher.models.facts import Tensors, number, read_tensors

# The architectures that mlx-lm 0.32 builds from these names and numbers alone; of others nothing is said.
_BUILT_ALIKE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# A tag of transformers' own.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def contradiction(path: Path) -> str | None:
    """What the model at `path`, which `directory.check` takes for whole, will not start for. BrokenModelError, or OSError."""
    return _tokenizer(path / "tokenizer.json") or _template(path) or _shapes(path)


def _tokenizer(file: Path) -> str | None:
    # With 26 MB this takes half a second, so a start leaves it to the library.
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{file} cannot be read: {error}"
    return None


def _template(path: Path) -> str | None:
    """Whether the chat template that transformers takes can be parsed."""
    try:
        import jinja2
    except ImportError:  # a package that is missing is a finding of its own
        return None
    environment = jinja2.Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"])
    for where, text in _templates(path):
        try:
            environment.parse(_GENERATION.sub("", text))
        except jinja2.TemplateSyntaxError as error:
            return f"the chat template in {where} cannot be read: line {error.lineno}: {error.message}"
    return None


def _templates(path: Path) -> Iterator[tuple[Path, str]]:
    """A file of its own comes before what tokenizer_config.json holds, which is a text or one for each name."""
    file, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        yield file, file.read_text("utf-8", errors="replace")
    elif config.is_file():
        said = json.loads(config.read_bytes())
        found: Any = said.get("chat_template") if isinstance(said, dict) else None
        for one in found if isinstance(found, list) else [found]:
            text = one.get("template") if isinstance(one, dict) else one
            if isinstance(text, str):
                yield config, text


def _shapes(path: Path) -> str | None:
    """Where config.json and the weights are of two models."""
    config, tensors = read_config(path), read_tensors(path)
    if config["model_type"] not in _BUILT_ALIKE:
        return None
    for key, said, found in _numbers(config, tensors):
        if found is not None and said is not None and said != found:
            return f"{path / 'config.json'} says {key} {said:,}, and the weights have {found:,}"
    return None


def _numbers(config: dict[str, Any], tensors: Tensors) -> Iterator[tuple[str, int | None, int | None]]:
    """A key of the configuration, what it says, and what the weights have: rows, which are never packed."""

    def rows(name: str) -> int | None:
        tensor = tensors.get(f"model.{name}.weight")
        return tensor[1][0] if tensor and tensor[1] else None

    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    yield "num_hidden_layers", number(config, "num_hidden_layers"), max(layers) + 1 if layers else None
    yield "vocab_size", number(config, "vocab_size"), rows("embed_tokens")
    yield "hidden_size", number(config, "hidden_size"), rows("norm")
    yield "intermediate_size", number(config, "intermediate_size"), rows("layers.0.mlp.gate_proj")
    keys = rows("layers.0.self_attn.k_proj")
    heads, kv_heads = number(config, "num_attention_heads"), number(config, "num_key_value_heads")
    size = _head_size(config, heads)
    if heads and size:
        yield "heads of attention", heads, _times(rows("layers.0.self_attn.q_proj"), size)
        yield "heads of keys", kv_heads or heads, _times(keys, size)


def _head_size(config: dict[str, Any], heads: int | None) -> int | None:
    hidden = number(config, "hidden_size")
    given = number(config, "head_dim") if config["model_type"] != "qwen2" else None  # which has no such key
    return given or (hidden // heads if hidden and heads else None)


def _times(count: int | None, size: int) -> int | None:
    return None if count is None else count // size
