"""One rank of a cluster, as its leader sees it: a process here, or one on another machine at the end of an ssh connection."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

from mlx_launcher.host.channel import Channel, Message

State = Literal["starting", "importing", "imported", "joining", "loading", "ready"]
# Of a line of a rank's log: longer ones are cut.
LINE_BYTES = 8192
SSH_FAILED = 255  # any other code is that of what ssh ran
# What a shell ends with that cannot run what it is told to.
NO_PROGRAM = (126, 127)
# What ssh says of keys: its own, and that of the other machine.
_REFUSED = ("Permission denied (", "Host key verification failed")


class Member(TypedDict):
    """A machine of the plan. `host` is what ssh is told; `here` says that it is the machine of the leader itself."""

    host: str
    ips: list[str]
    here: bool
    rdma: NotRequired[list[str | list[str] | None]]


class Rank:
    """A rank that was started. `hear(rank, message)` is called on a thread of its own, at its end with None.

    OSError where it cannot be started.
    """

    def __init__(
        self,
        number: int,
        member: Member,
        cluster: dict[str, Any],
        listeners: list[int],
        hear: "Callable[[Rank, Message | None], object]",
    ) -> None:
        self.number = number
        self.member = member
        self.name = f"rank {number} on {'this machine' if member['here'] else member['host']}"
        self.state: State = "starting"
        self.told_s = 0.0  # the leader's clock when it was heard of last
        self.pid: int | None = None
        self.beat: Message = {}
        self.phase: Message = {}
        self.fault: Message | None = None
        self.exit: int | None = None  # the rank's own, where its guard told
        self.last_line = ""
        ours, theirs = socket.socketpair()
        command, fds, stdio = self._command(cluster, listeners, theirs.fileno())
        environment = {name: os.environ[name] for name in cluster["env"] if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno() if stdio else subprocess.DEVNULL,
                stdout=theirs.fileno() if stdio else None,
                stderr=subprocess.PIPE,
                pass_fds=fds,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        if not stdio:
            self.pid = self._process.pid
        self._socket = ours
        self._channel = Channel(os.dup(ours.fileno()))
        self._channel.listen(lambda message: hear(self, message), on_gone=lambda: hear(self, None))
        threading.Thread(target=self._copy_log, name=f"log {number}", daemon=True).start()
        if stdio:
            self.send({"type": "begin", "env": environment})

    def _command(
        self, cluster: dict[str, Any], listeners: list[int], channel: int
    ) -> tuple[list[str], list[int], bool]:
        if not self.member["here"]:
            there = [cluster["python"], "-P", "-m", "mlx_launcher.host", "rank", "--channel", "stdio"]
            return [*cluster["ssh"], "--", self.member["host"], shlex.join(there)], [], True
        command = [sys.executable, "-P", "-m", "mlx_launcher.host", "rank", "--channel", str(channel)]
        if listeners:
            command += ["--listen", ",".join(map(str, listeners))]
        return command, [channel, *listeners], False

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        code = self.exit if self.exit is not None else self._process.poll()
        if code is None:
            return None
        if not self.member["here"] and self.exit is None:
            what = "the ssh connection ended" if code == SSH_FAILED else "its process there ended"
            return f"{what}: {self.last_line or f'exit code {code}'}"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"it was ended by {signal.Signals(-code).name}"
        return f"it exited with code {code}"

    @property
    def hopeless(self) -> bool:
        """Whether it never came to be, for a reason that another try does not mend: a key, or no interpreter there."""
        if self.member["here"] or self.pid is not None:
            return False
        code = self._process.poll()
        return code in NO_PROGRAM or (code == SSH_FAILED and any(said in self.last_line for said in _REFUSED))

    @property
    def code(self) -> int | None:
        """The exit code of its process here."""
        return self._process.poll()

    def hang_up(self) -> None:
        """Ends the channel: a rank that runs ends by itself then, on its machine."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """SIGKILL to its process here. A rank elsewhere is its guard's to end."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def row(self, now: float) -> dict[str, Any]:
        """What `status` shows of it; bytes and seconds."""
        step_s = self.beat.get("step_s")
        return {
            "rank": self.number,
            "host": self.member["host"],
            "pid": self.pid,
            "state": self.state,
            "rss_bytes": self.beat.get("rss_bytes"),
            "last_progress_s": None if step_s is None else round(step_s + now - self.told_s, 1),
        }

    def _copy_log(self) -> None:
        """What it writes becomes the leader's own log, with its number before what is not rank 0's."""
        assert self._process.stderr  # noqa: S101
        mark = f"[rank {self.number}] ".encode() if self.number else b""
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stderr.readline(LINE_BYTES):
                if text := line.decode("utf-8", "replace").strip():
                    self.last_line = text
                os.write(2, mark + line)
