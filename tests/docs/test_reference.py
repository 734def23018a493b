"""The tables of keys in the documentation say what config/schema.py and the defaults say; with UPDATE_DOCS=1 they are written."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.config import schema
from mlx_launcher.config.layers import DEFAULTS, DURATIONS

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- keys of {}: written by tests/docs/test_reference.py -->", "<!-- end of keys of {} -->"
# Keys that are told of elsewhere.
ELSEWHERE = {
    "backends": "See below.",
    "cache": "See [cache](cache.md).",
    "distributed": "See [cluster](cluster.md).",
    "warmup": "See [cache](cache.md#prompts-that-are-ready-in-the-morning).",
}
MODELS = (schema.Configuration, schema.Block, schema.Cluster)
NOT_OURS = "anyclaude's; known, and not used here"


def rows(model: type[schema.Keys], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One for each key that means something here, then one for those that are anyclaude's alone."""
    strangers = []
    for key, field in model.model_fields.items():
        nested = _nested(field.annotation)
        if not field.description:
            strangers.append(f"`{key}`")
        elif nested and key not in ELSEWHERE:
            yield f"| `{prefix}{key}` | {field.description} | |"
            yield from rows(nested, defaults, f"{prefix}{key}.")
        else:
            text, _, told = field.description.partition(" Default: ")
            is_ = " ".join([text, *([ELSEWHERE[key]] if key in ELSEWHERE else [])])
            name = prefix + key
            default = told.rstrip(".") or (default_of(name, defaults[name]) if defaults.get(name) is not None else "")
            yield f"| `{name}` | {is_} | {default}{' ' if default else ''}|"
    if strangers:
        yield f"| {', '.join(strangers)} | {NOT_OURS} | |"


def default_of(key: str, value: Any) -> str:
    """As a file would have it."""
    if key in DURATIONS:
        return f'`"{_duration(value)}"`'
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _duration(seconds: float) -> str:
    if seconds >= 60 and seconds % 60 == 0:
        return f"{seconds / 60:g}m"
    return f"{seconds:g}s" if seconds == int(seconds) else f"{seconds * 1000:g}ms"


def _nested(annotation: Any) -> type[schema.Keys] | None:
    parts = getattr(annotation, "__args__", ())
    return next((part for part in parts if isinstance(part, type) and issubclass(part, schema.Keys)), None)


def _names(model: type[schema.Keys], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, field in model.model_fields.items():
        yield prefix + key, field
        if nested := _nested(field.annotation):
            yield from _names(nested, f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("page", "name", "model", "prefix", "defaults"),
    [
        # DEFAULTS are those of a backend, and this one of the file.
        ("configuration.md", "the file", schema.Configuration, "", {"pythonVenv": DEFAULTS["pythonVenv"]}),
        ("configuration.md", "a backend", schema.Block, "", DEFAULTS),
        ("cache.md", "cache", schema.Cache, "cache.", DEFAULTS),
    ],
)
def test_the_tables_are_those_of_the_code(
    page: str, name: str, model: type[schema.Keys], prefix: str, defaults: Mapping[str, Any]
) -> None:
    file = DOCS / page
    text = file.read_text()
    begin, end = BEGIN.format(name), END.format(name)
    table = "\n".join(["| key | is | default |", "|---|---|---|", *rows(model, defaults, prefix)])
    head, rest = text.split(begin)
    written = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if os.environ.get("UPDATE_DOCS"):
        file.write_text(written)
    assert written == text, "run this test with UPDATE_DOCS=1"


def test_every_key_with_a_default_is_explained() -> None:
    fields = {name: field for model in MODELS for name, field in _names(model)}
    assert [key for key in DEFAULTS if not (key in fields and fields[key].description)] == []


def test_a_default_is_told_once() -> None:
    twice = [
        key
        for model in MODELS
        for key, field in _names(model)
        if " Default: " in (field.description or "") and DEFAULTS.get(key) is not None and key != "port"
    ]
    assert twice == []
