"""`run --with-caller` where a server runs on the port already: stay until the caller goes, and end nothing."""

import signal
import time
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.instances import ask, last_status
from mlx_launcher.cli.screen import phase_text, serves
from mlx_launcher.errors import LaunchError
from mlx_launcher.system.caller import Caller

# The line that anyclaude waits for.
STARTED = "Application startup complete"
_POLL_S = 0.25


def join(instance: Path, status: dict[str, Any], wanted_model: str) -> None:
    """Says what runs there, says when it is ready, and returns when the caller is gone.

    LaunchError `stopped` if the supervisor goes first. A server that is ended to be restarted comes back on the same socket.
    """
    caller = Caller()
    asked_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked_to_end.append(received))
    running, said, told_ready = status["model"]["path"], "", False
    other = "" if running == wanted_model else f", with another model than asked for: {running}"
    click.echo(f"mlx-launch: a server runs on port {instance.name} already; using it{other}")
    while not asked_to_end and not caller.gone():
        status = _status(instance)
        if serves(status) and not told_ready:
            click.echo(f"{STARTED}: {status['url']}")
            told_ready = True
        elif not told_ready and phase_text(status) != said:
            said = phase_text(status)
            click.echo(said)
        time.sleep(_POLL_S)


def _status(instance: Path) -> dict[str, Any]:
    try:
        return ask(instance, {"do": "status"})
    except LaunchError as error:
        if error.code != "not_running":
            raise
        how = "failed" if last_status(instance).get("state") == "failed" else "was stopped"
        raise LaunchError("stopped", f"the server on port {instance.name} {how}", "Start it again") from None
