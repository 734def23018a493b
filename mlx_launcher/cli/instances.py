"""What runs under a state directory: found by its lock, asked over its control socket, remembered in its state file."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from mlx_launcher.cli.output import App
from mlx_launcher.errors import EXIT_NOT_RUNNING, EXIT_USAGE, LaunchError

_PATIENCE_S = 5.0  # a supervisor that holds the lock and does not answer yet is starting or ending
_POLL_S = 0.1


def ask(instance: Path, request: dict[str, Any], patience_s: float = _PATIENCE_S) -> dict[str, Any]:
    """What the supervisor of an instance answers.

    LaunchError `not_running` when there is none, `no_answer` when there is one that does not answer, `out_of_reach` when
    its lock stays held for `patience_s` while it is not to be reached, or the error that it answered with.
    """
    from mlx_launcher.supervisor import control

    deadline = time.monotonic() + patience_s
    while True:
        try:
            answer = control.call(os.fspath(instance), request)
        except control.NotRunning:
            if not is_locked(instance):
                raise not_running(instance) from None
            if time.monotonic() > deadline:
                raise _out_of_reach(instance) from None
            time.sleep(_POLL_S)
            continue
        if not answer.get("ok"):
            error = answer.get("error", {})
            raise LaunchError(error.get("code", "refused"), error.get("message", "refused"), error.get("hint", ""))
        data: dict[str, Any] = answer["data"]
        return data


def is_locked(instance: Path) -> bool:
    """Whether a supervisor lives: it holds the lock for its whole life, and the kernel lets go of it for a dead one."""
    try:
        with open(instance / "lock", "rb") as lock:  # noqa: PTH123
            try:
                # Shared, so that two commands that look at the same time do not mistake each other for a supervisor.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False


def remembered(instance: Path) -> dict[str, Any]:
    """What the state file says; {} when there is none or it is torn. True of the past only: look at the lock first."""
    try:
        state = json.loads((instance / "state.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("status"), dict) else {}


def last_status(instance: Path) -> dict[str, Any]:
    """The status that was written last; {} when there is none."""
    status: dict[str, Any] = remembered(instance).get("status", {})
    return status


def log_file(instance: Path) -> Path:
    """The server's log, which `run --log-file` may have put elsewhere."""
    return Path(last_status(instance).get("log_file") or instance / "server.log")


def log_trouble(instance: Path) -> str | None:
    """Why nothing is written to the server's log, as far as its file tells; a supervisor follows no link in its own directory."""
    path = log_file(instance)
    if path.is_symlink() and path.parent == instance:
        return f"{path} is a link, which is not followed"
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for what it may not look at
        return f"{path} is a directory"
    return None


def choose(state_dir: Path, port: int | None) -> Path:
    """The instance that a command means: that of the port, else the one that runs, else the one that ran last.

    LaunchError `several` (exit 2) when more than one runs, `not_running` (exit 3) when none was ever started, `state_dir` when
    it cannot be told because the state directory cannot be read.
    """
    refuse_unreadable(state_dir, "the state directory", "state_dir", _ANOTHER)
    if port is not None:
        return state_dir / str(port)
    known = all_of(state_dir)
    running = [instance for instance in known if is_locked(instance)]
    if len(running) > 1:
        ports = ", ".join(instance.name for instance in running)
        raise LaunchError("several", f"servers run on the ports {ports}", "Choose one with --port", EXIT_USAGE)
    if running:
        return running[0]
    if not known:
        raise LaunchError("not_running", f"nothing is running under {state_dir}", _START, EXIT_NOT_RUNNING)
    return max(known, key=_last_change)


def refuse_unreadable(directory: Path, what: str, code: str, hint: str) -> None:
    """LaunchError for a directory that cannot be looked at: what is in it must not be taken for nothing."""
    try:
        os.scandir(directory).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LaunchError(code, f"{what} {directory} cannot be read: {error.strerror}", hint) from None


_START = "Start a server with mlx-launch start"
_ANOTHER = "See whose it is with ls -ld, or give another --state-dir"


def not_running(instance: Path) -> LaunchError:
    """Why nothing runs: never started, stopped, or the supervisor was killed before it could write how it ended."""
    port = instance.name
    state = remembered(instance)
    if state and state["status"].get("state") not in ("stopped", "failed"):
        what = f"nothing is running on port {port}: its supervisor (pid {state.get('pid')}) was killed"
    else:
        what = f"nothing is running on port {port}"
    return LaunchError("not_running", what, _START, EXIT_NOT_RUNNING)


def failure(app: App, status: dict[str, Any], exit_code: int) -> LaunchError:
    """Why a server gave up, from its last status."""
    reason = status.get("last_error") or "no reason was written"
    what = f"the server on port {status['port']} failed: {reason}"
    return LaunchError("failed", what, f"Its log tells more, see {app.typed('logs', status['port'])}", exit_code)


def _out_of_reach(instance: Path) -> LaunchError:
    what = f"the supervisor of port {instance.name} is starting or ending and cannot be asked yet"
    return LaunchError("out_of_reach", what, "Try again in a moment")


def all_of(state_dir: Path) -> list[Path]:
    """The directories of the instances that run or ever ran there, by port."""
    try:
        found = [path for path in state_dir.iterdir() if path.name.isdecimal() and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name))


def _last_change(instance: Path) -> float:
    try:
        return (instance / "state.json").stat().st_mtime
    except OSError:
        return 0.0
