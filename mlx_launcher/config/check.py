"""Everything that is wrong with a configuration, at once: types, unknown names, and keys that contradict each other."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_launcher.config import defaults, modes, urls
from mlx_launcher.config.document import Document, kind_of
from mlx_launcher.config.problems import Problem, error, shown, warning
from mlx_launcher.errors import LaunchError

_MAX_UNKNOWN = 20  # looking for the nearest name of thousands would take seconds
_MAX_BLOCKS = 100

# How pydantic's words for a wrong type read to somebody who has never heard of it.
_WANTED = {
    "int_type": "a whole number is wanted",
    "int_from_float": "a whole number is wanted",
    "int_parsing": "a whole number is wanted",
    "int_parsing_size": "a smaller number is wanted",
    "float_type": "a number is wanted",
    "finite_number": "a number is wanted",
    "bool_type": "true or false is wanted",
    "dict_type": "an object is wanted",
    "model_type": "an object is wanted",
    "list_type": "a list is wanted",
}


class Checked:
    """A block, or what stands beside the blocks: its values by dotted key, unset ones left out, and what is wrong."""

    def __init__(self, values: dict[str, Any], problems: list[Problem]) -> None:
        self.values = values
        self.problems = problems


def blocks_of(document: Document) -> dict[str, Any]:
    """The backends' blocks by name, checked or not; {} where there are none."""
    blocks = document.data.get("backends")
    return blocks if isinstance(blocks, dict) else {}


def check_top(document: Document) -> Checked:
    """What stands beside the blocks."""
    from mlx_launcher.config.schema import Top

    beside = {key: value for key, value in document.data.items() if key != "backends"}
    checked = _check(Top, beside, ())
    blocks = document.data.get("backends")
    if blocks is not None and not isinstance(blocks, dict):
        checked.problems.append(
            error(("backends",), f"an object of backends is wanted, not {kind_of(blocks)}", "See config schema")
        )
    return checked


def check_block(document: Document, name: str) -> Checked:
    """One backend's block; an absent one is empty."""
    from mlx_launcher.config.schema import block_type

    path = ("backends", name)
    raw = blocks_of(document).get(name)
    if raw is None:
        return Checked({}, [])
    if not isinstance(raw, dict):
        return Checked({}, [error(path, f"an object is wanted, not {kind_of(raw)}")])
    checked = _check(block_type(name), raw, path)
    broken = {problem.path for problem in checked.problems if problem.severity == "error"}
    if name not in modes.NOT_SERVED:
        checked.problems += [problem for problem in _contradictions(checked.values, path) if problem.path not in broken]
    return checked


def refuses_fallback(document: Document, name: str) -> bool:
    """Whether a block says `"fallback": null`: the one key whose null is not the default, but none."""
    raw = blocks_of(document).get(name)
    return isinstance(raw, dict) and raw.get("fallback", "") is None


def check_all(document: Document) -> list[Problem]:
    """Every problem of the whole file, as `config validate` shows them."""
    problems = [*document.problems, *check_top(document).problems]
    blocks = blocks_of(document)
    for name in list(blocks)[:_MAX_BLOCKS]:
        problems += check_block(document, name).problems
        problems += fallback_problems(document, name)
    if len(blocks) > _MAX_BLOCKS:
        problems.append(warning(("backends",), f"only the first {_MAX_BLOCKS} of {len(blocks)} backends were checked"))
    backend = document.data.get("backend")
    if isinstance(backend, str) and backend:
        problems += _find(backend, blocks, ("backend",))[1]
    return problems


def fallback_problems(document: Document, name: str) -> list[Problem]:
    """Whether a block's fallback exists, and its fallback's, and none of them comes back to one before it."""
    blocks = blocks_of(document)
    chain = [name]
    while True:
        raw = blocks.get(chain[-1])
        target = raw.get("fallback") if isinstance(raw, dict) else None
        if not isinstance(target, str) or not target:
            return []
        path = ("backends", chain[-1], "fallback")
        found, problems = _find(target, blocks, path)
        if found is None:
            return problems
        if found in modes.NOT_SERVED:
            return [error(path, f"{found} is no server that could take over here", "Name another one, or remove it")]
        if found in chain:
            circle = " -> ".join(shown(step) for step in [*chain, found])
            return [error(path, f"the fallbacks go round in a circle: {circle}", "Remove one of them")]
        chain.append(found)


def _find(name: str, blocks: Mapping[str, Any], path: tuple[str, ...]) -> tuple[str | None, list[Problem]]:
    """The block that a name in the file means, or what is wrong with the name."""
    try:
        return modes.find_block(name, blocks), []
    except LaunchError as failure:
        return None, [error(path, failure.message, failure.hint)]


def _check(schema: Any, raw: Mapping[str, Any], path: tuple[str, ...]) -> Checked:
    from pydantic import ValidationError

    try:
        model, broken = schema.model_validate(raw), []
    except ValidationError as failure:
        broken = [_wrong(found, path) for found in failure.errors(include_url=False)]
        # What is left when the broken keys are gone: their neighbours are looked at all the same.
        model = schema.model_validate(_without(raw, [problem.path[len(path) :] for problem in broken]))
    unknown = list(_unknown(model, path))
    return Checked(dict(_flat(model)), broken + unknown[:_MAX_UNKNOWN])


def _wrong(found: Any, path: tuple[str, ...]) -> Problem:
    # The value itself is not shown: it may be a key, or long.
    where = (*path, *(str(part) for part in found["loc"]))
    context = found.get("ctx", {})
    if found["type"] == "value_error":
        message = str(context["error"])
    elif found["type"] in ("greater_than_equal", "less_than_equal"):
        limit = context.get("ge", context.get("le"))
        message = f"a number of {limit} or {'more' if 'ge' in context else 'less'} is wanted"
    else:
        message = _WANTED.get(found["type"], found["msg"])
    given = kind_of(found["input"])
    tells_more = found["type"].endswith("_type") and given != "a number"  # "a whole number, not a number" does not
    return error(where, f"{message}, not {given}" if tells_more else message)


def _without(raw: Any, paths: list[tuple[str, ...]]) -> dict[str, Any]:
    """A copy without what the paths lead to; of a list that holds something broken nothing is left."""
    first = {path[0] for path in paths}
    kept = {}
    for key, value in raw.items():
        deeper = [path[1:] for path in paths if path[0] == key and len(path) > 1]
        if key not in first:
            kept[key] = value
        elif isinstance(value, dict) and deeper and (key,) not in paths:
            kept[key] = _without(value, deeper)
    return kept


def _unknown(model: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    known = list(type(model).model_fields)
    for key in list(model.model_extra or {})[:_MAX_UNKNOWN]:
        near = modes.nearest(key, known)
        yield warning((*path, key), "this key is not known", f"Did you mean {near}?" if near else "")
    for name in known:
        if hasattr(type(value := getattr(model, name)), "model_fields"):
            yield from _unknown(value, (*path, name))


def _flat(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if hasattr(type(value), "model_fields"):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield (
                f"{prefix}{name}",
                [item.model_dump() if hasattr(type(item), "model_fields") else item for item in value],
            )
        elif value is not None and value != "":
            yield f"{prefix}{name}", value


def _contradictions(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    url, port = values.get("baseUrl"), values.get("port", defaults.PORT)
    if url is not None:
        try:
            port = urls.port_here(url, values.get("host"))
        except ValueError as reason:
            yield error((*path, "baseUrl"), str(reason), "Give http://localhost:PORT/v1")
        else:
            if values.get("port", port) != port:
                what = f"port is {values['port']} and baseUrl says {port}"
                yield error((*path, "port"), what, "Make them the same, or leave one out")
    if values.get("metricsPort") == port:
        yield error((*path, "metricsPort"), f"{port} is the port of the server itself", "Choose another one")
    if path[-1] == modes.CLUSTER or values.get("distributed.enabled"):
        yield from _unknown_ways(values, path)
    if "host" in values:
        try:
            urls.address(values["host"])
        except ValueError as reason:
            yield error((*path, "host"), str(reason), "127.0.0.1 or 0.0.0.0, for example")
    if values.get("apiKey") and values.get("apiKeyFile"):
        yield error((*path, "apiKeyFile"), "apiKey is set too", "Leave one of them out")
    if values.get("requireKey") and not (values.get("apiKey") or values.get("apiKeyFile")):
        yield warning((*path, "requireKey"), "no apiKey is set beside it", "Set one here or in MLX_API_KEY")
    for name in values.get("env", {}):
        if not name or "=" in name:
            yield error((*path, "env", name), "this is no name of an environment variable")
    if values.get("command") == []:
        yield error((*path, "command"), "it is empty", "Name a program, or remove it")


def _unknown_ways(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    """How the machines of a cluster are to work together, in words that are not known. anyclaude may know others."""
    strategy, connection = (str(values.get(f"distributed.{key}", "auto")) for key in ("strategy", "connection"))
    if strategy.lower() not in defaults.STRATEGIES:
        what = f"{shown(strategy)} is not known"
        yield error((*path, "distributed", "strategy"), what, f"Known: {', '.join(defaults.STRATEGIES)}")
    if connection.lower() not in defaults.CONNECTIONS:
        what = f"{shown(connection)} is not known here: MLX's ring is used"
        yield warning((*path, "distributed", "connection"), what, f"Known: {', '.join(defaults.CONNECTIONS)}")
