"""What is on this machine, each model with what serves it and whether it fits, or with what is wrong with it."""

from collections.abc import Mapping
from typing import NamedTuple

from mlx_launcher.errors import LaunchError
from mlx_launcher.models import fit
from mlx_launcher.models.directory import BrokenModelError
from mlx_launcher.models.facts import Facts, facts, serves
from mlx_launcher.models.places import Place, installed
from mlx_launcher.models.resolve import refuse_other_formats
from mlx_launcher.system.memory import Memory


class Listed(NamedTuple):
    """`facts` is None for what is no whole MLX model, and `problem` then says why; it also says why nothing serves one."""

    place: Place
    facts: Facts | None
    backend: str | None
    fits: fit.Fits | None  # None where it or this machine's memory is unknown
    problem: str | None


def inventory(environment: Mapping[str, str], memory: Memory | None) -> list[Listed]:
    """All models of `places.installed`, by name. Reads configurations and headers, a few milliseconds a model."""
    return [_listed(place, memory) for place in installed(environment)]


def _listed(place: Place, memory: Memory | None) -> Listed:
    try:
        refuse_other_formats(place.path)
        model = facts(place.path)
    except LaunchError as error:
        return Listed(place, None, None, None, _without_path(error.message, place))
    except BrokenModelError as error:
        return Listed(place, None, None, None, _without_path(error.reason, place))
    backend = serves(model)
    problem = None if backend else f"mlx-lm has no architecture {model.architecture}"
    return Listed(place, model, backend, fit.judge(model, memory) if memory else None, problem)


def _without_path(reason: str, place: Place) -> str:
    return reason.replace(f"{place.path}/", "").removeprefix(f"{place.path} ")
