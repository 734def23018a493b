"""A server for a measurement: a supervisor as `start` has it, in a directory of its own, that goes with whoever started it."""

import contextlib
import copy
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_launcher.bench.client import Address, Answer, Message
from mlx_launcher.bench.client import ask as ask_server
from mlx_launcher.bench.figures import Stored
from mlx_launcher.cli.instances import ask, is_locked, last_status
from mlx_launcher.cli.launch import spawn, supervisor_environment
from mlx_launcher.cli.screen import phase_text
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Plan

_PREFIX = "bench-"
_POLL_S = 0.1
# What ends a server takes its stopTimeout; then the supervisor looks around.
_GRACE_S = 10.0


@contextlib.contextmanager
def directory(state_dir: Path) -> Iterator[Path]:
    """A directory for the time of a measurement, on the disk where the real cache lies. Removes what a killed one left."""
    create_state_dir(state_dir)
    for left in state_dir.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    with _writing_to(state_dir):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state_dir))
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _writing_to(place: Path) -> Iterator[None]:
    """LaunchError `state_dir` for what the file system has against it: a full disk, above all."""
    try:
        yield
    except OSError as error:
        what = f"nothing can be written to {place}: {error.strerror or error}"
        raise LaunchError("state_dir", what, "Make room there, or give another --state-dir") from None


def _remove_if_left(path: Path) -> None:
    """Whoever measures in it holds a lock on it; the server of one that was killed may still be ending."""
    if any(map(is_locked, path.glob("state/*"))):
        return
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def isolated(plan: Plan, cache: Path) -> Plan:
    """The plan for a measurement: another cache folder and nothing that would blur it.

    Only on loopback and without a key. No fallback, which would be measured in its place; no second try after a crash; no end
    for want of work; no standby, so that a restart is one; no warm-up; no page of metrics, whose port the user's server has.
    """
    made = copy.deepcopy(plan)
    made["fallback"], made["metrics_port"] = None, None
    made["idle_timeout_s"], made["standby"] = 0.0, False
    made["restart"]["max_restarts"] = 0
    settings = made["backend"]["settings"]
    if made["backend"]["kind"] == "host":
        settings["cache"]["dir"], settings["warmup"] = os.fspath(cache), []
        # For nobody else: on loopback, without the key, which would else lie in a file for a restart.
        made["hosts"], settings["api_key"], settings["require_key"] = ["127.0.0.1"], None, False
    return made


class Throwaway:
    """One server of an isolated plan. Used as a context: nothing of it runs afterwards, however that ends.

    LaunchError wherever the server fails, with its own reason.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._instance = Path(plan["instance"])
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._plan = _repeatable(plan)
        backend = plan["backend"]["settings"]
        self._address = Address(plan["hosts"][0], plan["port"], plan["model"]["id"], backend.get("api_key"))

    def __enter__(self) -> "Throwaway":
        # If we are killed it ends by itself, however early that is: nobody else can read what it writes then.
        self._held, theirs = os.pipe()
        try:
            try:
                spawn(self._plan, "--with-caller", began=self._began, stdout=theirs)
            finally:
                os.close(theirs)
            self._wait_until(lambda status: status["state"] == "ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it without waiting for what it does."""
        process, self._process = self._process, None
        try:
            if process is not None and process.poll() is None:
                self._end(process)
        finally:
            os.close(self._held)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            ask(self._instance, {"do": "stop", "timeout_s": 0}, patience_s=0)
        except LaunchError:
            process.terminate()
        try:
            process.wait(self._plan["stop_timeout_s"] + _GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        try:
            return ask_server(self._address, messages, max_tokens)
        except LaunchError as error:
            raise self._failed() or error from None

    def restart(self) -> None:
        number = ask(self._instance, {"do": "restart"})["reload_id"]

        def restarted(status: dict[str, Any]) -> bool:
            reload = status["reload"]
            if reload["id"] != number or reload["state"] in ("refused", "reverted"):
                raise LaunchError("restart", f"it did not come up again: {reload['reason']}")
            done: bool = reload["state"] == "done" and status["state"] == "ready"
            return done

        self._wait_until(restarted)

    def finish(self) -> None:
        """Ends it as `stop` does: what it has to write is written."""
        self._say("stopping")
        try:
            ask(self._instance, {"do": "stop"})
        except LaunchError as error:
            raise self._failed() or error from None
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert self._process  # noqa: S101
            self._process.wait(2 * self._plan["stop_timeout_s"] + _GRACE_S)

    def _began(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def _wait_until(self, there: Callable[[dict[str, Any]], bool]) -> None:
        """As long as it takes: what makes no progress, the supervisor gives up."""
        while True:
            try:
                status = ask(self._instance, {"do": "status"})
            except LaunchError as error:
                raise self._failed() or error from None
            if status["state"] == "failed":
                raise _gave_up(status)
            if there(status):
                return
            self._say(phase_text(status))
            time.sleep(_POLL_S)

    def _failed(self) -> LaunchError | None:
        """Why the server gave up, if it did: a supervisor without a fallback ends after the first crash."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S / 10)
        last = last_status(self._instance)
        return _gave_up(last) if last.get("state") == "failed" else None


def _gave_up(status: dict[str, Any]) -> LaunchError:
    return LaunchError("failed", f"its server failed: {status.get('last_error') or 'no reason was written'}")


def _repeatable(plan: Plan) -> Plan:
    """The plan, with a restart that finds the same: the command would make it from the file, with the user's cache folder."""
    instance = Path(plan["instance"])
    file = instance / "plan.json"
    again: Plan = {**plan, "source": {"argv": ["cat", os.fspath(file)], "cwd": "/", "env": supervisor_environment()}}
    envelope = {"ok": True, "data": again, "errors": []}
    with _writing_to(instance):
        instance.mkdir(mode=0o700, parents=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            json.dump(envelope, out)
    return again


def stored(cache: Path) -> Stored | None:
    """The files with something in them under a cache folder; None where there is no folder."""
    if not cache.is_dir():
        return None
    sizes = [size for file in cache.rglob("*") if file.is_file() and (size := file.stat().st_size)]
    return Stored(len(sizes), sum(sizes))
