"""`mlx-launch service`: a server that is there after every login."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.configured import current_directory
from mlx_launcher.cli.groups import Table
from mlx_launcher.cli.instances import ask, is_locked, last_status
from mlx_launcher.cli.launch import document_to_serve, make_plan, option_words, refuse_plan, show_notes
from mlx_launcher.cli.options import json_option, server_options, which_option
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.progress import Progress
from mlx_launcher.config.layers import Flags, settle
from mlx_launcher.errors import EXIT_NOT_RUNNING, EXIT_USAGE, LaunchError
from mlx_launcher.service import install as steps
from mlx_launcher.service.description import Service, absolute, describe
from mlx_launcher.service.look import Installed, installed, look, outdated, reach
from mlx_launcher.service.manager import Manager
from mlx_launcher.service.programs import PROGRAM
from mlx_launcher.service.programs import manager as manager_here

_COMMANDS = {
    "install": "Have a server started at every login, and start it now.",
    "uninstall": "Stop it and take it away.",
    "status": "Show what is installed and whether it runs.",
    "print": "Print what install would write.",
}


@click.group("service", cls=Table, table=_COMMANDS, no_args_is_help=False)
@json_option
def command() -> None:
    """A server that is there after every login: a systemd user unit on Linux, a launchd agent on macOS.

    With idleTimeout in the configuration nothing is loaded before it is asked for.
    """


@command.command("install")
@server_options
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@click.option("--no-start", is_flag=True, help="Write the file only, and show the commands that start it.")
@json_option
@click.pass_obj
def install_(app: App, /, dry_run: bool, no_start: bool, **server: Any) -> Result:
    """Have a server started at every login, and start it now.

    It takes the options of `start`, and the configuration in force. What was installed for the same port is replaced.
    """
    manager, flags = manager_here(os.environ), Flags(**server)
    service = _describe(app, manager, flags)
    there = look(manager, service.port)
    superseded = [] if flags.port else _superseded(manager, service)
    if no_start:
        plan: list[steps.Step] = steps.to_write(manager, service)
    else:
        plan = steps.to_install(manager, service, there, superseded, lambda: _answers(service))
    data = {**_data(manager, service), "steps": [str(step) for step in plan]}
    _refuse_second(app, service)
    if dry_run:
        refuse_plan(app, flags)
        return Result({**data, "changed": False}, data["steps"] or ["Nothing is to be done."])
    if not no_start:
        _require_manager(manager, service)
    with Progress(sys.stdout, quiet=app.json) as progress:
        made = make_plan(app, flags, progress.show)
    show_notes(app, made)
    if no_start:
        steps.perform(manager, plan)
        return Result({**data, "changed": True}, [f"Wrote {data['file']}. To start it:", *_by_hand(manager, service)])
    _perform(app, manager, service, there, plan)
    return Result({**data, "changed": bool(plan), "url": made["url"]}, _installed(app, data, made["url"], bool(plan)))


@command.command("uninstall")
@which_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@json_option
@click.pass_obj
def uninstall(app: App, port: int | None, dry_run: bool) -> Result:
    """Stop it and take it away. What is in the state directory stays."""
    manager = manager_here(os.environ)
    known = installed(manager)
    if port is None and len(known) > 1:
        ports = ", ".join(str(one.port) for one in known)
        raise LaunchError(
            "several", f"services are installed for the ports {ports}", "Choose one with --port", EXIT_USAGE
        )
    there = look(manager, port) if port is not None else known[0] if known else None
    plan = steps.to_uninstall(manager, there) if there else []
    data: dict[str, Any] = {"steps": [str(step) for step in plan], "changed": bool(plan) and not dry_run}
    if there is None or not plan:
        return Result(data, ["No service is installed."])
    if dry_run:
        return Result(data, data["steps"])
    steps.perform(manager, plan)
    state_dir = there.service.state_dir if there.service else str(app.state_dir)
    unit = manager.unit(there.port)
    return Result(data, [f"Took {unit} away. Its logs and its KV cache stay in {clean(state_dir)}."])


@command.command("status")
@which_option
@json_option
@click.pass_obj
def status(app: App, port: int | None) -> Result:
    """Show what is installed and whether it runs. Exits with 3 where it does not."""
    manager = manager_here(os.environ)
    found = [one for one in installed(manager) if port in (None, one.port)]
    services = [_seen(app, manager, one) for one in found]
    lines = [line for seen in services for line in _screen(manager, seen)]
    data = {"manager": manager.name, "services": services}
    if not services:
        what = "no service is installed" + (f" for port {port}" if port else "")
        error = LaunchError("not_installed", what, "mlx-launch service install does it", EXIT_NOT_RUNNING)
        return Result(data, [], error)
    stopped = [seen for seen in services if not seen["running"]]
    if not stopped:
        return Result(data, lines)
    names = ", ".join(seen["name"] for seen in stopped)
    known = any(seen["enabled"] is not None for seen in stopped)
    what = f"{names}: not running" if known else f"{manager.name} cannot be asked whether {names} runs"
    hint = f"Start it: {stopped[0]['start']}; what is known of its end: {manager.log(stopped[0]['port'])}"
    return Result(data, lines, LaunchError("not_running", what, hint, EXIT_NOT_RUNNING))


@command.command("print")
@server_options
@json_option
@click.pass_obj
def print_(app: App, /, **server: Any) -> Result:
    """Print what install would write, for the same options. Changes nothing."""
    manager, flags = manager_here(os.environ), Flags(**server)
    service = _describe(app, manager, flags)
    refuse_plan(app, flags)
    text = manager.text(service)
    return Result({**_data(manager, service), "text": text}, text.splitlines())


def _describe(app: App, manager: Manager, flags: Flags) -> Service:
    """The service for these flags and the configuration in force, both as they will be found at the next login."""
    cwd = current_directory()
    settings = settle(flags, os.environ, document_to_serve(app, flags))
    if settings.asked.origin.startswith("environment "):
        flags = flags._replace(mode=settings.asked.value)
    if flags.model is not None:
        flags = flags._replace(model=absolute(flags.model, cwd))
    options = option_words(flags._replace(port=None))
    return describe(PROGRAM, options, settings, os.environ, cwd, app.state_dir, manager.key_file())


def _superseded(manager: Manager, service: Service) -> list[Installed]:
    """Services that do the same on another port, which the configuration named before."""
    return [
        one
        for one in installed(manager)
        if one.service and one.port != service.port and one.service.but_for_its_port == service.but_for_its_port
    ]


def _refuse_second(app: App, service: Service) -> None:
    """LaunchError `already_running` where a launcher runs on the port that no service manager started."""
    instance = app.state_dir / str(service.port)
    if not is_locked(instance):
        return
    running = ask(instance, {"do": "status"})
    if not running.get("service"):
        what = f"a server that was started by hand runs on port {service.port} (pid {running['supervisor']['pid']})"
        raise LaunchError("already_running", what, f"Stop it first: {app.typed('stop', service.port)}")


def _require_manager(manager: Manager, service: Service) -> None:
    """LaunchError `no_service_manager`, with what to type where there is one."""
    reachable, why = reach(manager)
    if not reachable:
        commands = "; ".join(line.removeprefix("  ") for line in _by_hand(manager, service))
        what = f"there is no {manager.name} of this user to talk to, and nothing was changed: {clean(why)}"
        hint = (
            f"service install --no-start writes {manager.file(service.port)}; then, where you are logged in: {commands}"
        )
        raise LaunchError("no_service_manager", what, hint)


def _by_hand(manager: Manager, service: Service) -> list[str]:
    return [f"  {str(steps.Run(argv)).removeprefix('$ ')}" for argv in manager.load(service.port)]


def _answers(service: Service) -> bool:
    try:
        ask(Path(service.state_dir, str(service.port)), {"do": "status"}, patience_s=0)
    except LaunchError:
        return False
    return True


def _perform(app: App, manager: Manager, service: Service, there: Installed, plan: Sequence[steps.Step]) -> None:
    """Does it, or takes it back and says so."""
    try:
        steps.perform(manager, plan)
    except LaunchError as failure:
        try:
            steps.perform(manager, steps.to_put_back(manager, there))
            after = "what was there before is there again" if there.text is not None else "nothing of it was left"
        except LaunchError as second:
            after = f"and it could not be taken back: {second.message}"
        log = manager.log(service.port) if manager.keeps_log else f"cat {service.log}"
        hint = f"{log} tells more, or try it by hand: {app.typed('start', service.port)}"
        raise LaunchError(failure.code, f"{failure.message}; {after}", hint) from None


def _installed(app: App, data: Mapping[str, Any], url: str, changed: bool) -> list[str]:
    return [
        f"Installed {data['name']}: it runs now, and after every login."
        if changed
        else f"{data['name']} is installed and runs already; nothing was changed.",
        f"  url         {url}",
        f"  file        {clean(data['file'])}",
        f"  look        {app.typed('status', data['port'])}",
        f"  log         {app.typed('logs', data['port'])}",
        f"  take away   mlx-launch service uninstall --port {data['port']}",
    ]


def _data(manager: Manager, service: Service) -> dict[str, Any]:
    return {
        "manager": manager.name,
        "name": manager.unit(service.port),
        "port": service.port,
        "file": os.fspath(manager.file(service.port)),
    }


def _seen(app: App, manager: Manager, one: Installed) -> dict[str, Any]:
    """What `status` says of one service; null is what cannot be known."""
    state, drift = one.state, outdated(manager, one, PROGRAM)
    by_hand: int | None = None
    reason = None
    instance = Path(one.service.state_dir if one.service else app.state_dir, str(one.port))
    if is_locked(instance):
        try:
            running = ask(instance, {"do": "status"})
            by_hand = None if running.get("service") else running["supervisor"]["pid"]
        except LaunchError:
            pass
    elif (last := last_status(instance)).get("state") == "failed":
        reason = last.get("last_error")
    return {
        "name": manager.unit(one.port),
        "port": one.port,
        "file": os.fspath(one.file),
        "enabled": state and state.enabled,
        "running": bool(state and state.active),
        "pid": state and state.pid,
        "failed": state and state.failed,
        "reason": reason,
        "outdated": drift,
        "by_hand": by_hand,
        "start": str(steps.Run(manager.start(one.port))).removeprefix("$ "),
    }


def _screen(manager: Manager, seen: Mapping[str, Any]) -> list[str]:
    if seen["enabled"] is None:
        state = f"{manager.name} cannot be asked"
    else:
        state = f"running, pid {seen['pid']}" if seen["running"] else f"not running{_how(seen['failed'])}"
    lines = [f"{seen['name']}: {state}", f"  port        {seen['port']}", f"  file        {clean(seen['file'])}"]
    if seen["reason"]:
        lines.append(f"  gave up     {clean(seen['reason'])}")
    if seen["enabled"] is False:
        lines.append("  enabled     no: it is not started at login")
    if seen["by_hand"]:
        lines.append(f"  beside it   a server that was started by hand, pid {seen['by_hand']}")
    if seen["outdated"]:
        lines.append(f"  outdated    {clean(seen['outdated'])}; service install writes it anew")
    return lines


def _how(failed: str | None) -> str:
    return f", it failed: {failed}" if failed else ""
