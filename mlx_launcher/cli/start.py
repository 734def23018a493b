"""`mlx-launch start`: a supervisor in the background, shown until its server has proved itself."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.instances import ask, failure, last_status, log_file, not_running
from mlx_launcher.cli.launch import make_plan, show_notes, spawn
from mlx_launcher.cli.options import SECONDS, json_option, server_options
from mlx_launcher.cli.output import EXIT_INTERRUPTED, App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.cli.screen import failed_screen, phase_text, ready_screen, serves
from mlx_launcher.config.layers import Flags
from mlx_launcher.errors import EXIT_FAILED, EXIT_NOT_READY, LaunchError
from mlx_launcher.plan import CHECKSUMS, Plan, compared

_POLL_S = 0.1
_ATTEMPTS = 5  # to find a supervisor or become one, when others start and stop at the same moment
_LOG_LINES = 15
# By whether a service manager started it.
_RAN = {False: "It was running already", True: "It was running already, as a service"}


@click.command("start")
@server_options
@click.option("--no-wait", is_flag=True, help="Return as soon as the port is open.")
@click.option(
    "--timeout",
    type=SECONDS,
    metavar="S",
    help="Wait at most this many seconds; the server goes on starting. [default: as long as it takes]",
)
@json_option
@click.pass_obj
def command(app: App, /, no_wait: bool, timeout: float | None, **server: Any) -> Result:
    """Start a server in the background and wait until it is ready.

    Ready means that it has generated a token. Try it without a model of your own: mlx-launch start --demo
    """
    with Progress(sys.stdout, quiet=app.json) as progress:
        plan = make_plan(app, Flags(**server), progress.show)
    show_notes(app, plan)
    attached = _bring_up(app, plan)
    if no_wait:
        return _not_waiting(app, plan, attached)
    try:
        return _wait(app, plan, attached, timeout)
    except KeyboardInterrupt:
        raise _interrupted(app, plan) from None


def _bring_up(app: App, plan: Plan) -> bool:
    """Sees to it that one supervisor runs this plan; whether it was there before. LaunchError where that cannot be."""
    instance = Path(plan["instance"])
    lost = LaunchError("already_running", f"another start on port {plan['port']} was faster", "Try again in a moment")
    for _ in range(_ATTEMPTS):
        try:
            status = ask(instance, {"do": "status"})
            while status["draining"]:
                time.sleep(_POLL_S)
                status = ask(instance, {"do": "status"})
        except LaunchError as error:
            if error.code != "not_running":
                raise
        else:
            _require_same(app, status, plan)
            return True
        try:
            _spawn(app, plan)
        except LaunchError as error:
            if error.code != "already_running":
                raise
            lost = error
        else:
            return False
    raise lost


def _require_same(app: App, status: dict[str, Any], plan: Plan) -> None:
    """LaunchError `other_settings` when what runs on the port is not what was asked for."""
    running, wanted = status["settings"], compared(plan)
    names = [name for name in dict.fromkeys([*wanted, *running]) if running.get(name) != wanted.get(name)]
    if names:
        other = "; ".join(_difference(name, running.get(name), wanted.get(name)) for name in names)
        restart, stop = app.typed("restart", plan["port"]), app.typed("stop", plan["port"])
        service = status.get("service", False)
        otherwise = "install the service anew with them" if service else f"{stop} first"
        raise LaunchError(
            "other_settings",
            f"a {'service' if service else 'server'} runs on port {plan['port']} with other settings: {other}",
            f"{restart} takes up a changed configuration file; for other options, {otherwise}, or choose another --port",
        )


def _difference(name: str, is_: Any, wanted: Any) -> str:
    if name in CHECKSUMS:
        return f"another {name}"
    return f"{name} {_plain(is_)} instead of {_plain(wanted)}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _spawn(app: App, plan: Plan) -> None:
    """Starts a supervisor of its own session and returns when it owns the port. LaunchError: why it could not."""
    try:
        spawn(plan)
    except KeyboardInterrupt:
        raise _interrupted(app, plan) from None


def _wait(app: App, plan: Plan, attached: bool, timeout: float | None) -> Result:
    instance = Path(plan["instance"])
    deadline = None if timeout is None else time.monotonic() + timeout
    with Progress(sys.stdout, quiet=app.json) as progress:
        while True:
            try:
                status = ask(instance, {"do": "status"})
            except LaunchError as error:
                if error.code != "not_running":
                    raise
                return _ended(app, instance)
            if serves(status):
                break
            if status["state"] == "failed":
                return _gave_up(app, instance, status)
            if deadline is not None and time.monotonic() >= deadline:
                what = f"the server on port {plan['port']} is not ready after {timeout:g} s ({phase_text(status)})"
                hint = f"It goes on starting, see {app.typed('status', plan['port'])}"
                return Result(_data(status, attached), [], LaunchError("not_ready", what, hint, EXIT_NOT_READY))
            progress.show(phase_text(status), status["progress"])
            time.sleep(_POLL_S)
    require_key = plan["backend"]["settings"].get("require_key", False)
    said = [f"{_RAN[status.get('service', False)]}."] if attached else []
    return Result(_data(status, attached), said + ready_screen(app, status, require_key))


def _not_waiting(app: App, plan: Plan, attached: bool) -> Result:
    status = ask(Path(plan["instance"]), {"do": "status"})
    said = _RAN[status.get("service", False)] if attached else "It is starting in the background"
    see = app.typed("status", plan["port"])
    return Result(_data(status, attached), [f"{said} (pid {status['supervisor']['pid']}). See {see}."])


def _ended(app: App, instance: Path) -> Result:
    """What to say when the supervisor is gone while we waited."""
    last = last_status(instance)
    if last.get("state") == "failed":
        return _gave_up(app, instance, last)
    if last.get("state") == "stopped":
        raise LaunchError("stopped", f"the server on port {instance.name} was stopped while it started")
    raise LaunchError("supervisor_gone", not_running(instance).message, "Start it again")


def _gave_up(app: App, instance: Path, status: dict[str, Any]) -> Result:
    return Result(status, failed_screen(status, log_file(instance), _LOG_LINES), failure(app, status, EXIT_FAILED))


def _interrupted(app: App, plan: Plan) -> LaunchError:
    what = f"interrupted, the server on port {plan['port']} goes on starting in the background"
    return LaunchError("interrupted", what, f"{app.typed('stop', plan['port'])} ends it", EXIT_INTERRUPTED)


def _data(status: dict[str, Any], attached: bool) -> dict[str, Any]:
    return {"already_running": attached, **status}
