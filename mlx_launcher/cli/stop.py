"""`mlx-launch stop`: ends a server and waits until nothing of it is left."""

import sys
import time
from pathlib import Path

import click

from mlx_launcher.cli.instances import ask, choose, is_locked, last_status, remembered
from mlx_launcher.cli.options import SECONDS, json_option, which_option
from mlx_launcher.cli.output import EXIT_INTERRUPTED, App, Result
from mlx_launcher.cli.progress import Progress
from mlx_launcher.errors import LaunchError

_POLL_S = 0.1
# After the drain the supervisor asks with SIGTERM for its stopTimeout, kills, and looks around; then it is late.
_GRACE_S = 10.0


@click.command("stop")
@which_option
@click.option(
    "--timeout",
    type=SECONDS,
    metavar="S",
    help="How many seconds the requests in flight may take to finish. [default: stopTimeout, 30 s]",
)
@json_option
@click.pass_obj
def command(app: App, port: int | None, timeout: float | None) -> Result:
    """Stop the server and leave nothing behind.

    No new requests are taken, those in flight are finished, then everything that the server started is ended.
    """
    try:
        instance = choose(app.state_dir, port)
        answer = ask(instance, {"do": "stop"} if timeout is None else {"do": "stop", "timeout_s": timeout})
    except LaunchError as error:
        if error.code != "not_running":
            raise
        return Result({"stopped": False, "pid": None}, [f"{error.message}."])
    try:
        stop_timeout: float = answer["stop_timeout_s"]
        _wait(app, instance, (stop_timeout if timeout is None else timeout) + stop_timeout + _GRACE_S)
    except KeyboardInterrupt:
        what = f"interrupted, the server on port {instance.name} goes on stopping"
        raise LaunchError("interrupted", what, "", EXIT_INTERRUPTED) from None
    lines = [f"Stopped the server on port {instance.name}."]
    if last_status(instance).get("service"):
        lines.append("It is a service and comes back at the next login; mlx-launch service uninstall takes it away.")
    return Result({"stopped": True, "pid": answer["pid"]}, lines)


def _wait(app: App, instance: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with Progress(sys.stdout, quiet=app.json) as progress:
        while is_locked(instance):
            if time.monotonic() > deadline:
                pid = remembered(instance).get("pid")
                what = f"the server on port {instance.name} is still stopping after {timeout_s:.0f} s"
                raise LaunchError("still_stopping", what, f"End its supervisor with kill -KILL {pid}")
            progress.show(_doing(instance))
            time.sleep(_POLL_S)


def _doing(instance: Path) -> str:
    try:
        activity = ask(instance, {"do": "status"}, patience_s=0)["activity"]
    except LaunchError:
        return "stopping"
    busy = activity["in_flight"] + activity["queued"] if activity else 0
    return f"stopping, requests to finish: {busy}" if busy else "stopping"
