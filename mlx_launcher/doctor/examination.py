"""All checks in the order in which they are shown: what others rest on comes first."""

import sys
from collections.abc import Callable, Iterable

from mlx_launcher.config import shipped
from mlx_launcher.doctor import model, port, python, servers, services, settings, state
from mlx_launcher.doctor.check import Check, Subject
from mlx_launcher.system.machine import machine
from mlx_launcher.system.memory import model_memory

Look = Callable[[Subject], Check | Iterable[Check]]


def _interpreter(_: Subject) -> Check:
    return python.interpreter(sys.version_info[:3], machine(), sys.executable)


def _packages(_: Subject) -> Iterable[Check]:
    # What it takes to look may itself be what is missing.
    from mlx_launcher.doctor import packages

    return packages.packages(packages.pinned(_constraints()))


def _device(_: Subject) -> Check:
    from mlx_launcher.doctor import packages

    return python.device(machine(), packages.pinned(_constraints()))


def _constraints() -> str:
    return shipped.read_text(".", "constraints.txt")


def _model(subject: Subject) -> Iterable[Check]:
    return model.model(subject, model_memory())


def _open_files(_: Subject) -> Check:
    return state.open_files()


CHECKS: tuple[tuple[str, Look], ...] = (
    ("python", _interpreter),
    ("packages", _packages),
    ("device", _device),
    ("home", state.home),
    ("state directory", state.state_directory),
    ("configuration", settings.configuration),
    ("scripts", settings.scripts),
    ("model", _model),
    ("start", settings.start),
    ("disk", state.disk),
    ("port", port.port),
    ("server", servers.servers),
    ("service", services.services),
    ("leftovers", servers.leftovers),
    ("cache hits", servers.cache_hits),
    ("open files", _open_files),
)


def examine(subject: Subject, checks: Iterable[tuple[str, Look]] = CHECKS) -> list[Check]:
    """Every finding. Raises nothing: a check that breaks is a finding of its own."""
    return [found for name, look in checks for found in _findings(name, look, subject)]


def _findings(name: str, look: Look, subject: Subject) -> list[Check]:
    try:
        found = look(subject)
        return [found] if isinstance(found, Check) else list(found)
    except Exception as error:
        return [Check(name, "failed", f"this check itself failed, {type(error).__name__}: {error}")]
