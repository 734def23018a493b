"""Installing and uninstalling, as steps: they can be shown without being done, and what fails is taken back."""

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.errors import LaunchError
from mlx_launcher.service import programs
from mlx_launcher.service.description import Service
from mlx_launcher.service.look import Installed
from mlx_launcher.service.manager import Manager

_POLL_S = 0.1
# What a manager may take for one command, beside the stop of a service: systemctl returns when that is ready.
_COMMAND_S = 120.0


class Run(NamedTuple):
    """`must`: nothing after it is done when it fails, or takes longer than `within_s` seconds. Exit code `fine` is no failure."""

    argv: list[str]
    must: bool = True
    within_s: float = _COMMAND_S
    fine: int = 0

    def __str__(self) -> str:
        return f"$ {shlex.join(self.argv)}"


class Write(NamedTuple):
    file: Path
    text: str

    def __str__(self) -> str:
        return f"write {self.file}"


class Remove(NamedTuple):
    file: Path

    def __str__(self) -> str:
        return f"remove {self.file}"


class Gone(NamedTuple):
    """Waits until a service that was told to stop has ended."""

    port: int
    stop_s: int

    def __str__(self) -> str:
        return "wait until it has ended"


class Answers(NamedTuple):
    """Waits until the launcher answers."""

    condition: Callable[[], bool]
    within_s: float = 30.0

    def __str__(self) -> str:
        return "wait until it answers"


Step = Run | Write | Remove | Gone | Answers


def to_install(
    manager: Manager, service: Service, there: Installed, superseded: Iterable[Installed], answers: Callable[[], bool]
) -> list[Step]:
    """What puts it there and starts it, over an older one; nothing for what is there and runs already.

    `superseded` are services of other ports in whose place it comes; they are taken away last.
    """
    port, steps = service.port, list[Step]()
    text, state = manager.text(service), there.state
    if not (there.text == text and state and state.active and state.enabled):
        if state and (state.active or state.loaded):
            steps += _ending(manager, manager.stop(port), there)
        steps += [*to_write(manager, service), *map(Run, manager.load(port)), Answers(answers)]
    for other in superseded:
        steps += to_uninstall(manager, other)
    return steps


def to_write(manager: Manager, service: Service) -> list[Step]:
    """The file alone."""
    steps: list[Step] = [Write(manager.file(service.port), manager.text(service))]
    # A manager that makes the log itself would make it as readable as any other file.
    return steps if manager.keeps_log else [Write(Path(service.log), ""), *steps]


def to_uninstall(manager: Manager, there: Installed) -> list[Step]:
    """What ends it and leaves nothing of it; nothing where there is nothing."""
    port, steps = there.port, list[Step]()
    known = there.state is not None and (there.state.loaded or there.state.active)
    if known:
        steps += _ending(manager, manager.unload(port), there)
    files = [*manager.links(port), there.file]
    if there.service is not None and not manager.keeps_log:
        files.append(Path(there.service.log))
    removed: list[Step] = [Remove(file) for file in files if file.is_symlink() or file.exists()]
    steps += removed
    if there.state is not None and steps:
        steps += [Run(argv, must=False) for argv in manager.forget(port)]
    return steps


def to_put_back(manager: Manager, there: Installed) -> list[Step]:
    """After a failure: what was there before `to_install`, or nothing."""
    port = there.port
    within_s = _COMMAND_S + _stop_s(there)
    steps: list[Step] = [Run(argv, must=False, within_s=within_s) for argv in manager.unload(port)]
    if there.text is None:
        return [*steps, *map(Remove, manager.links(port)), Remove(there.file), *_forget(manager, port)]
    steps.append(Write(there.file, there.text))
    if there.state and there.state.active:
        return [*steps, Gone(port, _stop_s(there)), *(Run(argv, must=False) for argv in manager.load(port))]
    return [*steps, *_forget(manager, port)]


def perform(manager: Manager, steps: Sequence[Step]) -> None:
    """LaunchError `service_failed` where a step fails that must not."""
    for step in steps:
        try:
            _do(manager, step)
        except OSError as error:
            what = f"{error.filename or 'a file'} cannot be written or removed: {error.strerror or error}"
            raise LaunchError("service_failed", what, "Make it yours to change") from None


def _do(manager: Manager, step: Step) -> None:
    if isinstance(step, Write):
        programs.write(step.file, step.text)
    elif isinstance(step, Remove):
        step.file.unlink(missing_ok=True)
    elif isinstance(step, Run):
        done = programs.run(step.argv, step.within_s)
        if step.must and done.code not in (0, step.fine):
            said = done.error or done.output or f"exit status {done.code}"
            raise LaunchError("service_failed", f"{shlex.join(step.argv)} failed: {' '.join(said.split())}")
    elif isinstance(step, Gone):
        if not _until(lambda: not _active(manager, step.port), step.stop_s):
            what = f"{manager.unit(step.port)} has not ended after {step.stop_s} s"
            raise LaunchError("service_failed", what, "End it with mlx-launch stop")
    elif not _until(step.condition, step.within_s):
        raise LaunchError("service_failed", f"it does not answer after {step.within_s:g} s")


def _until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return met


def _active(manager: Manager, port: int) -> bool:
    done = programs.run(manager.query(port), _COMMAND_S)
    state = manager.state(done.code, done.output)
    # launchd forgets a service only when its process has ended; systemd never forgets one that has a file.
    return state.active or (state.loaded and not manager.keeps_log)


def _ending(manager: Manager, commands: Iterable[list[str]], there: Installed) -> list[Step]:
    """systemctl returns when what it stops has ended, launchctl may return before."""
    stop_s = _stop_s(there)
    runs = [Run(argv, within_s=_COMMAND_S + stop_s, fine=manager.still_ending) for argv in commands]
    return [*runs, Gone(there.port, stop_s)]


def _forget(manager: Manager, port: int) -> list[Step]:
    return [Run(argv, must=False) for argv in manager.forget(port)]


def _stop_s(there: Installed) -> int:
    return there.service.stop_s if there.service else int(_COMMAND_S)
