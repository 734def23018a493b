"""The server that a rollback is about, and the wait until its switch came to an end."""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.cli.instances import ask, choose, failure, is_locked, last_status, not_running
from mlx_launcher.cli.output import EXIT_INTERRUPTED, App
from mlx_launcher.cli.progress import Progress
from mlx_launcher.cli.screen import phase_text, serves
from mlx_launcher.errors import EXIT_FAILED, LaunchError

_POLL_S = 0.1


class Running(NamedTuple):
    """A supervisor that answers, and what it said."""

    instance: Path
    status: dict[str, Any]

    @property
    def port(self) -> int:
        return int(self.instance.name)

    @property
    def url(self) -> str:
        return str(self.status["url"])

    @property
    def rolled_back(self) -> bool:
        """Whether it serves with its fallback already, by itself or by command."""
        return self.status["rollback"] is not None


def running(app: App, port: int | None, configured: int | None) -> Running | None:
    """The server that is meant: on the port given, else on the configured one, else the only one; None where nothing runs.

    LaunchError `several` when none of those tells which.
    """
    instance = app.state_dir / str(port or configured)
    if port is None and not is_locked(instance):
        try:
            instance = choose(app.state_dir, None)
        except LaunchError as error:
            if error.code != "not_running":
                raise
            return None
    try:
        return Running(instance, ask(instance, {"do": "status"}))
    except LaunchError as error:
        if error.code != "not_running":
            raise
        return None


def wait(app: App, server: Running, number: int, name: str) -> dict[str, Any]:
    """The status once `name` has proved itself after reload `number`.

    LaunchError `reverted` when it did not and the one before serves again, `refused`, or how the supervisor ended.
    """
    see = app.typed("status", server.port)
    with Progress(sys.stdout, quiet=app.json) as progress:
        try:
            while True:
                status = ask(server.instance, {"do": "status"})
                reload = status["reload"] or {}
                if reload.get("id") != number:
                    raise LaunchError("overtaken", f"another restart overtook the switch to {name}", f"See {see}")
                if reload["state"] == "refused":
                    raise LaunchError("refused", reload["reason"].rstrip("."), reload["hint"] or "")
                if reload["state"] == "done" and serves(status):
                    return status
                if reload["state"] == "reverted" and serves(status):
                    what = f"{name} did not come up: {reload['reason'].rstrip('.')}; {status['backend']} serves again"
                    hint = f"The log tells more, see {app.typed('logs', server.port)}"
                    raise LaunchError("reverted", what, hint)
                progress.show(phase_text(status), status["progress"])
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            what = f"interrupted, the server on port {server.port} goes on switching to {name}"
            raise LaunchError("interrupted", what, f"See {see}", EXIT_INTERRUPTED) from None
        except LaunchError as error:
            if error.code != "not_running":
                raise
            raise _ended(app, server) from None


def _ended(app: App, server: Running) -> LaunchError:
    last = last_status(server.instance)
    if last.get("state") == "failed":
        return failure(app, last, EXIT_FAILED)
    if last.get("state") == "stopped":
        return LaunchError("stopped", f"the server on port {server.port} was stopped meanwhile")
    return LaunchError("supervisor_gone", not_running(server.instance).message, "Start it again")
