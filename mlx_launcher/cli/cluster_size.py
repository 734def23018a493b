"""`mlx-launch cluster size`: what each of several hosts needs for a model, and what bounds its tokens a second."""

import os
from collections.abc import Sequence
from typing import Any

import click

from mlx_launcher.cli.configured import current_directory
from mlx_launcher.cli.options import Number, Whole, json_option
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.screen import WIDTH, fit, size
from mlx_launcher.config import values
from mlx_launcher.errors import LaunchError
from mlx_launcher.models import resolve, sizing, splitting
from mlx_launcher.models.architectures import architecture
from mlx_launcher.models.directory import BrokenModelError, check, read_config
from mlx_launcher.models.facts import Tensors, read_tensors
from mlx_launcher.models.fit import PROMPT_TOKENS, Fits, judge_bytes
from mlx_launcher.models.outline import outline
from mlx_launcher.system.memory import Memory, gpu_share, model_memory

_HOSTS = 2
_CONTEXT = f"Tokens a conversation. [default: {PROMPT_TOKENS}]"
_GIGA = 1e9
_MICRO = 1e-6
_HEADS = ("HOST", "LAYERS", "WEIGHTS", "KV CACHE", "NEEDED", "MEMORY", "FITS")
_WHAT = {
    "single": "one host",
    "tensor": "tensor: every host has a part of each layer",
    "pipeline": "pipeline: every host has some of the layers",
}


def _sizes(_: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [values.typed_size(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{error}, for each host, as in 64GB,128GB", param=option) from None


_RATE = Number(min=1e-6, max=1e9)
_COUNT = Whole(1, 10**9)


@click.command("size")
@click.option("--model", metavar="DIR", required=True, help="The directory of an MLX model, or org/name on the hub.")
@click.option("--hosts", type=Whole(1, 64), metavar="N", help=f"How many hosts. [default: {_HOSTS}]")
@click.option(
    "--memory", callback=_sizes, metavar="SIZES", help="What each Mac has: 64GB,128GB. [default: as this one]"
)
@click.option("--context", type=_COUNT, default=PROMPT_TOKENS, metavar="N", help=_CONTEXT)
@click.option("--conversations", type=_COUNT, default=1, metavar="N", help="How many are kept at once. [default: 1]")
@click.option("--strategy", type=click.Choice(["tensor", "pipeline"]), help="One of them. [default: those that work]")
@click.option("--bandwidth", type=_RATE, metavar="GB/S", help="Of each host's memory, in GB a second.")
@click.option("--link", type=_RATE, metavar="GB/S", help="Between two hosts, in GB a second.")
@click.option("--latency", type=_RATE, metavar="US", help="Of one message between two hosts, in microseconds.")
@json_option
@click.pass_obj
def command(
    app: App,
    model: str,
    hosts: int | None,
    memory: list[int] | None,
    context: int,
    conversations: int,
    strategy: splitting.Strategy | None,
    bandwidth: float | None,
    link: float | None,
    latency: float | None,
) -> Result:
    """Compute what each host needs for a model, whether it fits, and what bounds its tokens a second.

    From the model's configuration alone: nothing is loaded, and org/name need not be on this machine. A Mac gives its GPU
    75 % of its memory. Tokens a second are upper bounds for one conversation, and want --bandwidth and --link.
    """
    room = _memory(hosts, memory)
    config, tensors, source = _read(model)
    shape = sizing.shape(config, tensors, architecture(config))
    works, fails = splitting.strategies(config, len(room))
    chosen = [name for name in works if strategy in (None, name) or name == "single"]
    if not chosen:
        raise _impossible(model, len(room), {name: fails[name] for name in fails if strategy in (None, name)})
    rates = (bandwidth and bandwidth * _GIGA, link and link * _GIGA, latency and latency * _MICRO)
    sized = [sizing.size(shape, name, len(room), context, conversations) for name in chosen]
    notes = _notes(shape, source, context, sized, rates)
    data = {
        "model": {"id": model, "architecture": config["model_type"], "layers": len(shape.layers), "source": source},
        "weight_bytes": shape.weight_bytes,
        "context": context,
        "conversations": conversations,
        "computed": True,
        "strategies": [_as_json(one, room, sizing.speed(one, *rates)) for one in sized],
        "impossible": fails,
        "notes": notes,
    }
    lines = [
        fit(f"{clean(model)}: {config['model_type']}, {_count(len(shape.layers), 'layer')}", WIDTH),
        f"{_count(len(room), 'host')}, {_count(conversations, 'conversation')} of {context:,} tokens",
        "Computed from the model's configuration, not measured.",
    ]
    for one in sized:
        lines += ["", *_screen(one, room, sizing.speed(one, *rates))]
    lines += ["", *(f"{name}: not possible, {why}" for name, why in fails.items() if strategy is None), *notes]
    return Result(data, lines if lines[-1] else lines[:-1])


def _memory(hosts: int | None, given: Sequence[int] | None) -> list[Memory | None]:
    """What a model may take on each host; None where this machine stands for all and does not tell."""
    if given is None:
        return [model_memory()] * (hosts or _HOSTS)
    if len(given) == 1 and hosts:
        given = list(given) * hosts
    if hosts not in (None, len(given)):
        raise click.UsageError(f"--memory names {len(given)} hosts, --hosts {hosts}")
    return [gpu_share(total) for total in given]


def _read(name: str) -> tuple[dict[str, Any], Tensors, str]:
    """The configuration, the tensors, and where they are from: "files", or "config" where the weights are not (all) here."""
    path = resolve.find(name, current_directory(), os.environ)
    if path is None:
        from mlx_launcher.models.download import fetch_config

        config = fetch_config(name)
        return config, outline(config), "config"
    try:
        config = read_config(path)
    except BrokenModelError as error:
        raise LaunchError("model_incomplete", error.reason, error.hint.rstrip(".")) from None
    try:
        check(path)
        return config, read_tensors(path), "files"
    except BrokenModelError:
        return config, outline(config), "config"


def _impossible(model: str, hosts: int, reasons: dict[splitting.Strategy, str]) -> LaunchError:
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    what = f"{clean(model)} cannot be spread over {hosts} hosts: {why}"
    return LaunchError("strategy_unsupported", what, "Try another --strategy or number of --hosts")


def _notes(
    shape: sizing.Shape,
    source: str,
    context: int,
    sized: Sequence[sizing.Sized],
    rates: tuple[float | None, float | None, float | None],
) -> list[str]:
    notes = []
    if source == "config":
        notes.append("The weights are not here: they are taken as mlx-lm would pack them.")
    if shape.uncounted:
        notes.append("Some layers keep a state of a size that is not known here: not counted.")
    if shape.context and context > shape.context:
        notes.append(f"The model's own context is {shape.context:,} tokens.")
    if rates[1] and not rates[2] and any(one.steps for one in sized):
        notes.append("Without --latency the link's time is that of the bytes alone.")
    return notes


def _as_json(one: sizing.Sized, room: Sequence[Memory | None], speed: sizing.Speed) -> dict[str, Any]:
    hosts = [
        {
            "rank": rank,
            "first_layer": host.layers.start,
            "layers": len(host.layers),
            "weight_bytes": host.weight_bytes,
            "kv_cache_bytes": host.cache_bytes,
            "needed_bytes": host.needed_bytes,
            "memory_bytes": memory.bytes_ if memory else None,
            "fits": _fits(host, memory),
        }
        for rank, (host, memory) in enumerate(zip(one.hosts, room, strict=True))
    ]
    token = {"read_bytes": round(one.read_bytes), "link_bytes": round(one.sent_bytes), "link_messages": one.steps}
    return {"name": one.strategy, "hosts": hosts, "token": {**token, **speed._asdict()}}


def _fits(host: sizing.Host, memory: Memory | None) -> Fits | None:
    return judge_bytes(host.needed_bytes, memory) if memory else None


def _screen(one: sizing.Sized, room: Sequence[Memory | None], speed: sizing.Speed) -> list[str]:
    rows = [_HEADS, *(_row(rank, one, memory) for rank, memory in enumerate(room))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    table = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [_WHAT[one.strategy], *(line.rstrip() for line in table), *(f"  {line}" for line in _token(one, speed))]


def _row(rank: int, one: sizing.Sized, memory: Memory | None) -> tuple[str, ...]:
    host = one.hosts[rank]
    layers = f"{host.layers.start}-{host.layers.stop - 1}"
    numbers = (size(host.weight_bytes), size(host.cache_bytes), size(host.needed_bytes))
    return (str(rank), layers, *numbers, size(memory.bytes_ if memory else None), _fits(host, memory) or "?")


def _token(one: sizing.Sized, speed: sizing.Speed) -> list[str]:
    link = f"; {size(round(one.sent_bytes))} pass the link in {one.steps} messages" if one.steps else ""
    lines = [f"a token reads {size(round(one.read_bytes))} of memory{link}"]
    if speed.tokens_per_s is None:
        wanted = "--bandwidth" if speed.memory_s is None and not one.steps else "--bandwidth and --link"
        return [*lines, f"what that is in tokens a second takes {wanted}"]
    assert speed.memory_s is not None  # noqa: S101
    assert speed.link_s is not None  # noqa: S101
    parts = f"memory {speed.memory_s * 1e3:,.2f} ms, link {speed.link_s * 1e3:,.2f} ms"
    return [*lines, f"at most {speed.tokens_per_s:,.1f} tokens/s, bound by the {speed.bound_by}: {parts}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"
