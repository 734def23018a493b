"""What runs, as OpenMetrics text (the format that Prometheus and its relatives read). No text of a user's is ever in it."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from mlx_launcher import __version__
from mlx_launcher.buckets import BOUNDS
from mlx_launcher.supervisor.policy import State
from mlx_launcher.supervisor.rules import Cause
from mlx_launcher.supervisor.totals import Counted

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_PREFIX = "mlx_launch"

Labels = Mapping[str, str]


class _Sample(NamedTuple):
    """`suffix` follows the family's name. None is a value that is not known; its line is left out."""

    value: float | None
    labels: Labels = MappingProxyType({})
    suffix: str = ""


def render(status: dict[str, Any], totals: Counted, restarts: Mapping[Cause, int]) -> str:
    """The whole text. `status` is what the command of that name shows; the others count since the supervisor began."""
    lines = (*_about(status), *_work(status, totals), *_servers(status, restarts), "# EOF")
    return "".join(f"{line}\n" for line in lines)


def _about(status: dict[str, Any]) -> Iterator[str]:
    labels = {"version": __version__, "backend": status["backend"], "model": status["model"]["id"]}
    yield from _family("", "info", "What is served, and by what.", [_Sample(1, labels, "_info")])
    states = [_Sample(int(status["state"] == name), {f"{_PREFIX}_state": name}) for name in get_args(State)]
    yield from _family("state", "stateset", "What the supervisor's server is doing.", states)
    up = int(status["state"] in ("ready", "degraded"))
    yield from _family("up", "gauge", "Whether a server has proved itself and answers.", [_Sample(up)])
    server = status["server"]
    yield from _family(
        "uptime_seconds", "gauge", "How long the supervisor has run.", [_Sample(status["supervisor"]["uptime_s"])]
    )
    yield from _family(
        "server_uptime_seconds",
        "gauge",
        "How long the server that runs has run.",
        [_Sample(server["uptime_s"] if server else None)],
    )


def _work(status: dict[str, Any], totals: Counted) -> Iterator[str]:
    ended = [_Sample(count, {"outcome": outcome}, "_total") for outcome, count in totals["answers"].items()]
    yield from _family("requests", "counter", "Requests for an answer, by how they ended.", ended)
    for name, text in (
        ("prompt_tokens", "Tokens of the prompts that were asked."),
        ("cached_tokens", "Those of them that came from the KV cache."),
        ("completion_tokens", "Tokens of the answers."),
    ):
        yield from _family(name, "counter", text, [_Sample(totals["tokens"][name], suffix="_total")])
    waits = [
        sample
        for cache in ("cold", "warm")
        for sample in _histogram(f"first_token_{cache}_s", totals, {"cache": cache})
    ]
    text = "From the request to its first token, the queue included; warm: half of the prompt or more was cached."
    yield from _family("time_to_first_token_seconds", "histogram", text, waits)
    text = "From one token of an answer to the next."
    yield from _family("token_seconds", "histogram", text, _histogram("token_s", totals, {}))
    for name, text in (("in_flight", "Requests that are being answered."), ("queued", "Requests that wait.")):
        yield from _family(name, "gauge", text, [_Sample(status["activity"][name])])


def _servers(status: dict[str, Any], restarts: Mapping[Cause, int]) -> Iterator[str]:
    cache = status["kv_cache"]
    if cache["dir"] is None:  # nobody has told what lies there, which is not nothing
        cache = {"memory_bytes": cache.get("memory_bytes")}
    for name, text in (
        ("entries", "Entries of the KV cache on disk."),
        ("bytes", "Their size."),
        ("limit_bytes", "What all models' entries may take there."),
        ("memory_bytes", "What of the KV cache is in memory."),
    ):
        yield from _family(f"kv_cache_{name}", "gauge", text, [_Sample(cache.get(name))])
    counts = [_Sample(restarts.get(cause, 0), {"reason": cause}, "_total") for cause in get_args(Cause)]
    yield from _family("server_restarts", "counter", "Servers that took another one's place, by reason.", counts)
    processes = [
        _Sample(status[name]["rss_bytes"] if status[name] else None, {"process": name})
        for name in ("server", "standby", "supervisor")
    ]
    text = "Resident memory of the processes on this machine."
    yield from _family("memory_bytes", "gauge", text, processes)
    ranks = [
        _Sample(rank["rss_bytes"], {"rank": str(rank["rank"]), "host": str(rank["host"])}) for rank in status["ranks"]
    ]
    text = "Resident memory of a cluster's ranks, each on its machine."
    yield from _family("rank_memory_bytes", "gauge", text, ranks)


def _histogram(name: str, totals: Counted, labels: Labels) -> Iterator[_Sample]:
    below = 0
    for bound, count in zip((*map(str, BOUNDS[name]), "+Inf"), totals["counts"][name], strict=True):
        below += count
        yield _Sample(below, {**labels, "le": bound}, "_bucket")
    yield _Sample(below, labels, "_count")
    yield _Sample(totals["sums"][name], labels, "_sum")


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    full = f"{_PREFIX}_{name}" if name else _PREFIX
    yield f"# TYPE {full} {kind}"
    unit = next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), None)
    if unit:
        yield f"# UNIT {full} {unit}"
    yield f"# HELP {full} {text}"
    for value, labels, suffix in samples:
        if value is not None:
            inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            yield f"{full}{suffix}{f'{{{inner}}}' if inner else ''} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").encode("utf-8", "replace").decode()


def _number(value: float) -> str:
    return repr(round(value, 6))
