"""A new plan for a running supervisor: made by the command, as it was made the first time, and refused where it is none."""

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_launcher.errors import EXIT_FAILED
from mlx_launcher.plan import Plan, Source
from mlx_launcher.supervisor import plans
from mlx_launcher.supervisor.process import LAST_READS, READ_BYTES, signal_group

MAX_PLAN_BYTES = 4 << 20


class Refusal(NamedTuple):
    """Why there is no new plan, what to do about it, and the exit code that says so (CLI.md)."""

    reason: str
    hint: str
    exit: int = EXIT_FAILED


class Reload:
    """One `restart`, SIGHUP or switch between backends, from the request to its outcome. `seen` is what `status` shows of it.

    `plan` runs the source's command, whose messages go to `write`; `poll` gives the outcome once, when there is one.
    """

    def __init__(self, number: int, trigger: str, write: Callable[[bytes], None]) -> None:
        self.seen: dict[str, Any] = {
            "id": number,
            "trigger": trigger,
            "state": "switching",
            "reason": None,
            "hint": None,
            "exit": None,
            "changes": [],
        }
        self._write = write
        self._said = bytearray()
        self._popen: subprocess.Popen[bytes] | None = None
        self._refusal: Refusal | None = None

    def plan(self, source: Source, selector: selectors.BaseSelector) -> None:
        """Starts the command."""
        self._selector = selector
        self.seen["state"] = "planning"
        try:
            self._start(source)
        except (OSError, ValueError, IndexError) as error:
            self._refusal = Refusal(f"the command that makes the plan cannot be run: {error}", _AFRESH)

    @property
    def under_way(self) -> bool:
        return self.seen["state"] in ("planning", "switching")

    def ended(self, state: str, refusal: Refusal | None = None) -> None:
        """`done`, `refused` or `reverted`, the last two with the reason."""
        self.seen["state"] = state
        if refusal:
            self.seen.update(refusal._asdict())

    def poll(self) -> Plan | Refusal | None:
        """The new plan, or why there is none; None while the command runs, and ever after the outcome was given."""
        if self._popen is None:
            refusal, self._refusal = self._refusal, None
            return refusal
        code = self._popen.poll()
        if code is None:
            return None
        while self._read(self._popen.stdout):
            pass
        for _ in range(LAST_READS):
            if not self._read(self._popen.stderr):
                break
        self._let_go()
        refusal, self._refusal = self._refusal, None
        outcome = refusal or _outcome(code, self._said)
        self._said.clear()
        return outcome

    def abandon(self) -> None:
        """Ends the command, whatever it is doing."""
        if self._popen is not None:
            if self._popen.poll() is None:
                signal_group(self._popen.pid, signal.SIGKILL)
                self._popen.wait()
            self._let_go()

    def _start(self, source: Source) -> None:
        self._popen = subprocess.Popen(
            source["argv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=source["cwd"],
            env=source["env"],
            start_new_session=True,
        )
        for stream in (self._popen.stdout, self._popen.stderr):
            assert stream is not None  # noqa: S101
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, lambda mask, stream=stream: self._on_stream(stream))

    def _on_stream(self, stream: Any) -> None:
        # An earlier event of the same round may have abandoned it all: a stop.
        if self._popen is not None and self._read(stream) is None:
            self._selector.unregister(stream)

    def _read(self, stream: Any) -> bool | None:
        """One read: whether there was something to keep; None at the end of the stream."""
        assert self._popen is not None  # noqa: S101
        try:
            data = os.read(stream.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            return None
        if stream is self._popen.stderr:
            self._write(data)
        elif len(self._said) + len(data) <= MAX_PLAN_BYTES:
            self._said += data
        else:
            self._refusal = Refusal(f"the plan is larger than {MAX_PLAN_BYTES >> 20} MiB", _LOOK)
            if self._popen.returncode is None:
                signal_group(self._popen.pid, signal.SIGKILL)
            return False
        return True

    def _let_go(self) -> None:
        if self._popen is None:
            return
        for stream in (self._popen.stdout, self._popen.stderr):
            assert stream is not None  # noqa: S101
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
            stream.close()
        self._popen = None


_LOOK = "Look at it with mlx-launch config show"
_AFRESH = "Use mlx-launch stop, then start"


def _outcome(code: int, said: bytearray) -> Plan | Refusal:
    """What the command's JSON envelope says."""
    try:
        envelope = json.loads(said)
        if envelope["ok"]:
            return plans.check(envelope["data"])
        error = envelope["errors"][0]
        return Refusal(str(error["message"]), str(error["hint"]), code if code > 0 else EXIT_FAILED)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        what = f"code {code}" if code >= 0 else f"signal {-code}"
        why = f"the command that makes the plan ended with {what} and without a plan ({error!r})"
        return Refusal(why, "The server's log may tell more")


def misplaced(current: Plan, new: Plan) -> Refusal | None:
    """Why the new plan is not one for this supervisor, which keeps its sockets and its directory."""
    for name, was, is_ in (
        ("port", current["port"], new["port"]),
        ("host", ", ".join(current["hosts"]), ", ".join(new["hosts"])),
        ("state directory", current["instance"], new["instance"]),
    ):
        if was != is_:
            return Refusal(f"the {name} is now {is_} instead of {was}, which a restart cannot change", _AFRESH)
    return None
