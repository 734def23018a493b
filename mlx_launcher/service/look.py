"""What is installed, what its manager says of it, and whether it is what this version would have written."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.service import programs
from mlx_launcher.service.description import Service
from mlx_launcher.service.manager import Manager, State

_ANSWER_S = 2.0  # for a manager's answer, which takes milliseconds


class Installed(NamedTuple):
    """One port's service. `text` is None where none is installed, `service` where it was not written by us.

    `state` is None where the manager cannot be asked.
    """

    port: int
    file: Path
    text: str | None
    service: Service | None
    state: State | None


def look(manager: Manager, port: int) -> Installed:
    file = manager.file(port)
    text = programs.read(file)
    reachable, _ = reach(manager)
    state = None
    if reachable:
        done = programs.run(manager.query(port), _ANSWER_S)
        state = manager.state(done.code, done.output)
    return Installed(port, file, text, manager.parse(text) if text is not None else None, state)


def installed(manager: Manager) -> list[Installed]:
    """All of them, by port."""
    try:
        ports = [port for path in manager.files().iterdir() if (port := manager.port(path.name)) is not None]
    except OSError:
        return []
    return [look(manager, port) for port in sorted(ports)]


def reach(manager: Manager) -> tuple[bool, str]:
    """Whether there is a manager to talk to, and what it said where there is not."""
    done = programs.run(manager.reachable(), _ANSWER_S)
    return done.code == 0, done.error.splitlines()[0] if done.error else f"{manager.reachable()[0]} failed"


def _is_same(one: str, other: str) -> bool:
    """Whether both are the interpreter of one environment, which may be called python and python3 there."""
    return Path(one).parent == Path(other).parent and Path(one).samefile(other)


def outdated(manager: Manager, there: Installed, program: Sequence[str]) -> str | None:
    """Why its file is not what this version would write for the same options; None where it is. `program` is how we are run."""
    if there.service is None:
        return "it was changed by hand, or is another program's"
    command = there.service.command
    if not Path(command[0]).exists():
        return f"its interpreter is gone: {command[0]}"
    if not _is_same(command[0], program[0]) or command[1 : len(program)] != tuple(program[1:]):
        return f"it runs another installation: {command[0]}"
    if manager.text(there.service) != there.text:
        return "it was written by another version, or changed by hand"
    return None
