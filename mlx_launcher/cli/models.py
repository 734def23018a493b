"""`mlx-launch models`: what is on this machine, what serves it and whether it fits."""

import dataclasses
import os
from typing import Any

import click

from mlx_launcher.cli.options import json_option
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.screen import WIDTH, columns, fit, size
from mlx_launcher.models.inventory import Listed, inventory
from mlx_launcher.models.places import hub_cache, lmstudio_folders
from mlx_launcher.system.memory import Memory, model_memory

_HEADS = ("MODEL", "SIZE", "WEIGHTS", "CONTEXT", "SERVED BY", "FITS")
_GAP = 2
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@click.command("models")
@json_option
@click.pass_obj
def command(app: App) -> Result:
    """List the models on this machine.

    Those of the Hugging Face cache and of LM Studio, with their size, how the weights are kept, the context in tokens, the
    backend that serves them, and whether they fit into this machine's memory with a prompt of 8,192 tokens.
    """
    memory = model_memory()
    models = inventory(os.environ, memory)
    lines = [*_table(models), "", *_legend(memory)] if models else _nothing()
    return Result({"models": [_as_json(model) for model in models]}, lines)


def _as_json(model: Listed) -> dict[str, Any]:
    facts = model.facts
    return {
        "name": model.place.name,
        "path": str(model.place.path),
        "source": model.place.source,
        "bytes": facts.weight_bytes if facts else None,
        "quantization": dataclasses.asdict(facts.quantization) if facts and facts.quantization else None,
        "context": facts.context if facts else None,
        "architecture": facts.architecture if facts else None,
        "cache": facts.cache if facts else None,
        "backend": model.backend,
        "fits": model.fits,
        "problem": model.problem,
    }


def _table(models: list[Listed]) -> list[str]:
    """A name that is too long for its column has a line of its own: it is there to be copied."""
    rows = [_cells(model) for model in models]
    widths = [max(columns(row[i]) for row in (_HEADS, *(row for row in rows if row))) for i in range(len(_HEADS))]
    room = WIDTH - sum(widths[1:]) - _GAP * (len(widths) - 1)
    widths[0] = min(max(columns(_HEADS[0]), *(columns(clean(model.place.name)) for model in models)), room)
    lines = [_line(_HEADS, widths)]
    for model, cells in zip(models, rows, strict=True):
        name = clean(model.place.name)
        if cells and columns(name) <= widths[0]:
            lines.append(_line((name, *cells[1:]), widths))
        else:
            lines.append(fit(name, WIDTH))
            lines += [_line(cells, widths)] if cells else []
        if model.problem:
            lines.append(fit(f"  not served: {clean(model.problem)}", WIDTH))
    return lines


def _cells(model: Listed) -> tuple[str, ...]:
    """What stands right of the name; nothing for what is no model."""
    facts = model.facts
    if facts is None:
        return ()
    weights = str(facts.quantization) if facts.quantization else _DTYPES[facts.dtype]
    context = fit(f"{facts.context:,}", 12) if facts.context else "?"
    return ("", size(facts.weight_bytes), fit(clean(weights), 14), context, model.backend or "-", model.fits or "?")


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [cell + " " * (width - columns(cell)) for cell, width in zip(cells, widths, strict=True)]
    return (" " * _GAP).join(padded).rstrip()


def _legend(memory: Memory | None) -> list[str]:
    if memory is None:
        return ["How much memory a model may take on this machine is not known."]
    return [fit(f"Memory for a model on this machine: {size(memory.bytes_)}, {memory.what}.", WIDTH)]


def _nothing() -> list[str]:
    looked = [hub_cache(os.environ), *lmstudio_folders(os.environ)]
    return [
        "There is no model on this machine, as far as these directories go:",
        *(f"  {clean(str(path))}" for path in looked),
        "Download one and serve it:",
        "  mlx-launch start --model mlx-community/Qwen3-4B-4bit",
        "Or try it without a download:",
        "  mlx-launch start --demo",
    ]
