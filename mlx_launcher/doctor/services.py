"""The login services: what this version would have written, started at login, running, and alone on their ports."""

import shlex
from collections.abc import Iterator

from mlx_launcher.doctor.check import Check, Subject
from mlx_launcher.service.look import Installed, installed, outdated
from mlx_launcher.service.manager import Manager
from mlx_launcher.service.programs import PROGRAM, manager


def services(subject: Subject) -> Iterator[Check]:
    """One finding for each service that is installed."""
    here = manager(subject.environment)
    found = [_service(subject, here, one) for one in installed(here)]
    yield from found or [Check("service", "skipped", "none is installed")]


def _service(subject: Subject, here: Manager, one: Installed) -> Check:
    name, state = here.unit(one.port), one.state
    if (why := outdated(here, one, PROGRAM)) is not None:
        gone = one.service is not None and why.startswith("its interpreter")
        return Check("service", "failed" if gone else "warning", f"{name}: {why}", _anew(subject, one))
    if state is None:
        return Check("service", "skipped", f"{name} is installed; {here.name} cannot be asked about it from here")
    start = shlex.join(here.start(one.port))
    by_hand = _by_hand(subject, one.port)
    if by_hand is not None and not state.active:
        what = f"{name} does not run, as a server that was started by hand (pid {by_hand}) has its port"
        return Check("service", "warning", what, f"{subject.typed('stop', one.port)} && {start}")
    if not state.enabled:
        commands = " && ".join(map(shlex.join, here.load(one.port)))
        return Check("service", "warning", f"{name} is not started at login", commands)
    if state.failed is not None and not state.active:
        return Check("service", "warning", f"{name} failed: {state.failed}", start)
    if not state.active:
        return Check("service", "warning", f"{name} does not run", start)
    return Check("service", "ok", f"{name} runs, pid {state.pid}")


def _anew(subject: Subject, one: Installed) -> str:
    """The command that installs it again, with the options that it was installed with where they are known."""
    if one.service is None:
        return f"{subject.plain('service')} install --port={one.port}"
    words = one.service.install_words()
    program = shlex.split(subject.plain("service"))[0]
    return shlex.join([program, *words])


def _by_hand(subject: Subject, port: int) -> int | None:
    """Who has the port, where that is a launcher that no service manager started."""
    running = next((instance for instance in subject.instances if instance.port == port and instance.running), None)
    if running is None or running.status.get("service", True):
        return None
    pid = running.status.get("supervisor", {}).get("pid")
    return int(pid) if pid else None
