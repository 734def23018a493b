"""One server process: spawned in a session of its own, tied to us by a channel and an output pipe."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable

from mlx_launcher import system
from mlx_launcher.plan import Backend
from mlx_launcher.supervisor.channel import Channel

# How long the server of a killed supervisor may take: by itself, after SIGTERM, after SIGKILL.
ORPHAN_S = (5.0, 5.0, 2.0)


class Server:
    """A running host. Raises OSError from the constructor when it cannot be started; nothing is left then."""

    def __init__(self, backend: Backend, listeners: list[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        self.output, write_end = os.pipe()
        fds = [sock.fileno() for sock in listeners]
        argv = [*backend["argv"], "--channel", str(theirs.fileno()), "--listen", ",".join(map(str, fds))]
        try:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=[theirs.fileno(), *fds],
                start_new_session=True,
                cwd=backend["cwd"],
                env={**os.environ, **backend["env"]},
            )
        except BaseException:
            ours.close()
            os.close(self.output)
            raise
        finally:
            theirs.close()
            os.close(write_end)
        os.set_blocking(self.output, False)
        self.channel = Channel(ours)
        self.pid = self._popen.pid
        self.started = system.process_started(self.pid)
        self.began = time.monotonic()

    def exit_code(self) -> int | None:
        """What waitpid says, negative for a signal; None while it runs."""
        return self._popen.poll()

    def group_left(self) -> bool:
        return system.group_left(self.pid)

    def signal_group(self, number: int) -> None:
        """Signals the whole group. Only while the leader has not been reaped or `group_left`: else the number may be reused."""
        signal_group(self.pid, number)

    def close(self) -> None:
        self.channel.close()
        os.close(self.output)


def signal_group(pgid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)
        if number == signal.SIGTERM:  # a process that is stopped (Ctrl-Z) does not see SIGTERM
            os.killpg(pgid, signal.SIGCONT)


def describe_exit(code: int) -> tuple[str, str | None]:
    """What `exit_code` gave, in words, and the name of the signal if it was one."""
    if code >= 0:
        return f"the server exited with code {code}", None
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the server was ended by {name}", name


def end_orphan(pid: int, started: float | None, note: Callable[..., None]) -> None:
    """Waits for the server of a killed supervisor, which goes by itself when its channel ends, then ends its group.

    Only ever that very process: a reused pid has another start time and is left alone.
    """
    if pid <= 1 or not system.process_alive(pid, started):
        return
    note("orphan", pid=pid)
    for wait_s, then in zip(ORPHAN_S, (signal.SIGTERM, signal.SIGKILL, None), strict=True):
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if not system.process_alive(pid, started):
                if system.group_left(pid):
                    signal_group(pid, signal.SIGKILL)
                return
            time.sleep(0.02)
        if then is not None:
            note("orphan_signalled", pid=pid, signal=then.name)
            signal_group(pid, then)
