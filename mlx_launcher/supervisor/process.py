"""One server process: spawned in a session of its own, and everything it says."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from mlx_launcher import system
from mlx_launcher.plan import Backend, Plan
from mlx_launcher.supervisor.channel import Channel
from mlx_launcher.supervisor.plans import lends
from mlx_launcher.supervisor.probe import Probe

READ_BYTES = 65536
# What a server that just ended may have left in its pipe (64 KiB, or 1 MiB where somebody enlarged it).
LAST_READS = 16
# How long the server of a killed supervisor may take: by itself, after SIGTERM, after SIGKILL.
ORPHAN_S = (5.0, 5.0, 2.0)


class Server:
    """A running server. `hear` gets its messages, `write` its output; both are called from the loop that owns `selector`.

    A host of ours borrows the listeners and speaks by its channel. Any other server binds the port itself and is asked for a
    token instead, and for any answer, now and then, once it is ready. Raises OSError or ValueError from the constructor when it
    cannot be started; nothing is left then.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        listeners: list[socket.socket],
        selector: selectors.BaseSelector,
        hear: Callable[[dict[str, Any]], None],
        write: Callable[[bytes], None],
    ) -> None:
        self._selector, self._hear, self._write = selector, hear, write
        self._channel: Channel | None = None
        self._probe: Probe | None = None
        if lends(backend):
            self._spawn(backend, [], [])
            look_s = plan["hang_timeout_s"] / 4
            self._probe = Probe(selector, plan["hosts"], plan["port"], backend["settings"], hear, look_s)
        else:
            self._spawn_host(backend, listeners)
        # Of a cluster, the ranks on this machine.
        self.ranks_here = [
            rank
            for rank, member in enumerate(backend["settings"].get("cluster", {}).get("hosts", []))
            if member["here"]
        ]
        self.pid = self._popen.pid
        self.started = system.process_started(self.pid)
        self.began = time.monotonic()
        selector.register(self._output, selectors.EVENT_READ, self._on_output)

    def _spawn_host(self, backend: Backend, listeners: list[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        fds = [sock.fileno() for sock in listeners]
        arguments = ["--channel", str(theirs.fileno()), "--listen", ",".join(map(str, fds))]
        try:
            self._spawn(backend, arguments, [theirs.fileno(), *fds])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self._selector.register(ours, selectors.EVENT_READ, self._on_channel)

    def _spawn(self, backend: Backend, arguments: list[str], fds: list[int]) -> None:
        self._output, write_end = os.pipe()
        try:
            self._popen = subprocess.Popen(
                [*backend["argv"], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=fds,
                start_new_session=True,
                cwd=backend["cwd"],
                env={**os.environ, **backend["env"]},
            )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(self._output, False)

    # -- what is asked about it and done to it

    @property
    def drains(self) -> bool:
        """Whether it can be asked to finish what is in flight. Of any other server nobody knows what is."""
        return self._channel is not None

    @property
    def dropped(self) -> int:
        """How many of its messages were none."""
        return self._channel.dropped if self._channel else 0

    @property
    def due(self) -> float | None:
        """When `poll` has something to do."""
        return self._probe.due if self._probe else None

    def poll(self, now: float) -> None:
        """To be called at `due` and after each round of events."""
        if self._probe:
            self._probe.poll(now)

    def proved(self) -> None:
        """It is ready: no token is asked for any more."""
        if self._probe:
            self._probe.watch()

    def hand_over(self, hear: Callable[[dict[str, Any]], None], write: Callable[[bytes], None]) -> None:
        """From now on it speaks to others."""
        self._hear, self._write, self.began = hear, write, time.monotonic()

    def remembered(self) -> dict[str, Any]:
        """What a later supervisor needs to find it, should this one be killed."""
        return {"pid": self.pid, "started": self.started, "goes_by_itself": self.drains}

    def exit_code(self) -> int | None:
        """What waitpid says, negative for a signal; None while it runs."""
        return self._popen.poll()

    def group_left(self) -> bool:
        return system.group_left(self.pid)

    def cpu_s(self) -> float | None:
        """What its group has used of the processor."""
        return system.group_cpu_s(self.pid)

    def end(self, how: str) -> None:
        """One step of its way down, as the policy decides them; any other word does nothing."""
        if how == "drain":
            self.send({"type": "drain"})
        elif how == "term":
            self.send({"type": "stop"})
            self.signal_group(signal.SIGTERM)
        elif how == "term_asleep":
            self.signal_group(signal.SIGTERM, wake=False)
        elif how == "kill":
            self.signal_group(signal.SIGKILL)

    def signal_group(self, number: int, wake: bool = True) -> None:
        """Signals the whole group; SIGTERM wakes who is stopped if `wake`.

        Only while the leader has not been reaped or `group_left`: else the number may be reused.
        """
        signal_group(self.pid, number, wake)

    def send(self, message: dict[str, Any]) -> None:
        if self._channel:
            self._channel.send(message)
            self._watch(self._channel)

    def hear_last_words(self) -> None:
        """What it said before it ended: a fault that it reported last counts."""
        if self._channel and self._channel.sock in self._selector.get_map():
            for _ in range(LAST_READS):
                if self._channel.ended:
                    break
                self._receive(self._channel)

    def close(self) -> None:
        """Lets go of it, once its last output is written."""
        if self._probe:
            self._probe.close()
            self._probe = None
        for _ in range(LAST_READS):
            if not self._pump():
                break
        if self._output in self._selector.get_map():
            self._selector.unregister(self._output)
        os.close(self._output)
        if self._channel:
            if self._channel.sock in self._selector.get_map():
                self._selector.unregister(self._channel.sock)
            self._channel.close()

    # -- events

    def _on_output(self, _mask: int) -> None:
        if not self._pump():
            self._selector.unregister(self._output)

    def _pump(self) -> bool:
        """One read of its output; False at the end."""
        try:
            data = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return True
        if data:
            self._write(data)
        return bool(data)

    def _on_channel(self, mask: int) -> None:
        channel = self._channel
        if channel is None:
            return
        if mask & selectors.EVENT_WRITE:
            channel.flush()
        if mask & selectors.EVENT_READ:
            self._receive(channel)
        self._watch(channel)

    def _receive(self, channel: Channel) -> None:
        for message in channel.receive():
            self._hear(message)

    def _watch(self, channel: Channel) -> None:
        if channel.sock not in self._selector.get_map():
            return
        if channel.ended:
            self._selector.unregister(channel.sock)
            return
        write = selectors.EVENT_WRITE if channel.wants_to_write else 0
        self._selector.modify(channel.sock, selectors.EVENT_READ | write, self._on_channel)


def signal_group(pgid: int, number: int, wake: bool = True) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)
        if number == signal.SIGTERM and wake:  # a process that is stopped (Ctrl-Z) does not see SIGTERM
            os.killpg(pgid, signal.SIGCONT)


def describe_exit(code: int) -> dict[str, Any]:
    """What `exit_code` gave: its code or the name of its signal, and the reason in words."""
    if code >= 0:
        return {"code": code, "signal": None, "reason": f"the server exited with code {code}"}
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return {"code": None, "signal": name, "reason": f"the server was ended by {name}"}


def end_orphan(pid: int, started: float | None, goes_by_itself: bool, note: Callable[..., None]) -> None:
    """Ends the group of a killed supervisor's server; a host goes by itself when its channel ends, and is waited for first.

    Only ever that very process: a reused pid has another start time and is left alone.
    """
    if pid <= 1 or not system.process_alive(pid, started):
        if system.process_started(pid) is not None:
            note("state_ignored", reason=f"pid {pid} is another process by now")
        return
    note("orphan", pid=pid)
    waits = ORPHAN_S if goes_by_itself else (0.0, *ORPHAN_S[1:])
    for wait_s, then in zip(waits, (signal.SIGTERM, signal.SIGKILL, None), strict=True):
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
