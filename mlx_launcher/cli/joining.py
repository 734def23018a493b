"""`run --with-caller` where a server runs on the port already: stay until the caller goes, and end nothing."""

import signal
import time
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.instances import ask
from mlx_launcher.cli.screen import phase_text
from mlx_launcher.errors import LaunchError
from mlx_launcher.system.caller import Caller

# The line that anyclaude waits for.
STARTED = "Application startup complete"
_POLL_S = 0.25
_SERVES = ("ready", "idle", "degraded")


def join(instance: Path, status: dict[str, Any], wanted_model: str) -> None:
    """Says what runs there, says when it is ready, and returns when the caller is gone. LaunchError if the server goes first."""
    caller = Caller()
    asked_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked_to_end.append(received))
    running, said, told_ready = status["model"]["path"], "", False
    other = "" if running == wanted_model else f", with another model than asked for: {running}"
    click.echo(f"mlx-launch: a server runs on port {instance.name} already; using it{other}")
    while not asked_to_end and not caller.gone():
        status = ask(instance, {"do": "status"})
        if status["state"] in _SERVES and not told_ready:
            click.echo(f"{STARTED}: {status['url']}")
            told_ready = True
        elif not told_ready and phase_text(status) != said:
            said = phase_text(status)
            click.echo(said)
        if status["state"] == "failed" or status["draining"]:
            raise LaunchError("stopped", f"the server on port {instance.name} was stopped", "Start it again")
        time.sleep(_POLL_S)
