"""From a plan to the loop: `python -m mlx_launcher.supervisor --plan-fd N [--report-fd N] [MANNER] [--idle]`.

The manner is --foreground, --with-caller or --service; none is the background. --idle: the first connection starts the server.
"""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH101, PTH103, PTH118, PTH120, PTH123

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NamedTuple

from mlx_launcher import system
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.plan import Plan
from mlx_launcher.supervisor import notify, plans, status
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import Port
from mlx_launcher.supervisor.loop import Supervisor
from mlx_launcher.supervisor.process import end_orphan
from mlx_launcher.supervisor.terminal import Terminal

# A command that looks whether the lock is free holds it for a moment.
LOCK_S = 0.3


MANNERS = ("--foreground", "--with-caller", "--service")


class Arguments(NamedTuple):
    plan_fd: int
    report_fd: int | None
    manners: set[str]
    idle: bool


def main(argv: list[str]) -> int:
    wake = _catch_signals()
    try:
        arguments = _parse(argv)
    except ValueError:
        sys.stderr.write("mlx-launch: this program is started by mlx-launch. Use mlx-launch run\n")
        return EXIT_USAGE
    exit_code = system.service_exit_code if "--service" in arguments.manners else int
    try:
        supervisor = _prepare(arguments, wake)
    except LaunchError as error:
        _report(arguments.report_fd, {"ok": False, "error": error.as_json(), "exit": error.exit_code}, error)
        return exit_code(error.exit_code)
    _report(arguments.report_fd, {"ok": True, "pid": os.getpid()})
    return exit_code(supervisor.run())


def _parse(argv: list[str]) -> Arguments:
    """A few flags do not need argparse, which costs most of a megabyte."""
    rest = list(argv)
    numbers: dict[str, int] = {}
    switches: set[str] = set()
    while rest:
        flag = rest.pop(0)
        if flag in (*MANNERS, "--idle"):
            switches.add(flag)
        elif flag in ("--plan-fd", "--report-fd") and rest:
            numbers[flag] = int(rest.pop(0))
        else:
            raise ValueError(flag)
    if "--plan-fd" not in numbers:
        raise ValueError("--plan-fd")
    return Arguments(numbers["--plan-fd"], numbers.get("--report-fd"), switches - {"--idle"}, "--idle" in switches)


def _catch_signals() -> socket.socket:
    """Signals become bytes on a socket that the loop reads; they count from now on, even before the loop runs."""
    wake, feed = socket.socketpair()
    wake.setblocking(False)
    feed.setblocking(False)
    signal.set_wakeup_fd(feed.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return wake


def _prepare(arguments: Arguments, wake: socket.socket) -> Supervisor:
    """Everything that must hold before anybody is told that the supervisor runs. In this order: each step relies on the last."""
    plan = _read_plan(arguments.plan_fd)
    _keep_standard_descriptors()
    _enter(plan["instance"])
    _lock(plan)
    journal = Journal(os.path.join(plan["instance"], "journal.jsonl"))
    _end_what_was_left(journal)
    port = Port(plan["hosts"], plan["port"], journal.note)
    port.own()
    try:
        managed = notify.take(os.environ, plan["source"]["env"])
        service = "--service" in arguments.manners
        terminal = Terminal(bool(arguments.manners), "--with-caller" in arguments.manners, managed if service else None)
        return Supervisor(plan, port, journal, wake, terminal, arguments.idle)
    except OSError as error:
        raise _state_error(plan["instance"], error) from error


def _read_plan(fd: int) -> Plan:
    try:
        with contextlib.suppress(OSError):
            os.lseek(fd, 0, os.SEEK_SET)  # the writer's offset is ours
        with open(fd, "rb") as file:
            return plans.check(json.loads(file.read()))
    except (OSError, ValueError) as error:
        raise LaunchError(
            "bad_plan", f"the plan cannot be used: {error}", "Start again with mlx-launch start"
        ) from error


def _keep_standard_descriptors() -> None:
    """Without 0, 1 and 2 open, a socket could get their numbers, and a child would write its errors into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _enter(instance: str) -> None:
    """Makes the instance's directory, and is in it for good: the socket's path may be too long to be named otherwise."""
    try:
        os.makedirs(os.path.dirname(instance), mode=0o700, exist_ok=True)
        os.makedirs(instance, mode=0o700, exist_ok=True)
        directory = os.open(instance, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        os.fchdir(directory)
        os.close(directory)
        os.chmod(".", 0o700)
    except OSError as error:
        raise _state_error(instance, error) from error


def _state_error(instance: str, error: OSError) -> LaunchError:
    reason = f"{error.filename} in it is a link" if error.errno == errno.ELOOP else error.strerror or error
    message = f"the state directory {instance} cannot be used: {reason}"
    return LaunchError("state_dir", message, "Choose another one with --state-dir")


def _lock(plan: Plan) -> None:
    """Takes the instance's lock for the life of this process: its descriptor is never closed."""
    try:
        fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _state_error(plan["instance"], error) from error
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise _state_error(plan["instance"], error) from error
        if time.monotonic() >= deadline:
            state, _ = status.read_state()
            who = f" (pid {state['pid']})" if state and isinstance(state.get("pid"), int) else ""
            message = f"a supervisor{who} already runs for port {plan['port']}"
            raise LaunchError("already_running", message, "See mlx-launch status")
        time.sleep(0.02)


def _end_what_was_left(journal: Journal) -> None:
    """We hold the lock, so what state.json names and what still runs belongs to a supervisor that was killed."""
    state, trouble = status.read_state()
    if trouble is not None:
        journal.note("state_ignored", reason=trouble)
    for kind in ("server", "standby"):
        left: Any = state.get(kind) if state else None
        if left is None:
            continue
        if not isinstance(left, dict) or type(left.get("pid")) is not int:
            journal.note("state_ignored", reason=f"it names no {kind}")
        else:
            end_orphan(left["pid"], left.get("started"), left.get("goes_by_itself") is not False, journal.note)


def _report(fd: int | None, report: dict[str, Any], error: LaunchError | None = None) -> None:
    """Says once how the start went: to whoever waits on `fd`, else an error to the terminal."""
    with contextlib.suppress(OSError):
        if fd is not None:
            with open(fd, "wb") as file:
                file.write(json.dumps(report).encode() + b"\n")
        elif error is not None:
            sys.stderr.write(f"mlx-launch: {error.message}. {error.hint}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
