"""The loop that owns all state: one thread, one `selectors` wait, one function per event."""

import contextlib
import os
import random
import select
import selectors
import signal
import socket
import time
from typing import Any

from mlx_launcher import system
from mlx_launcher.plan import Plan
from mlx_launcher.supervisor import status
from mlx_launcher.supervisor.control import Answer, ControlServer, error_answer
from mlx_launcher.supervisor.journal import Journal, RotatingFile, utc_now
from mlx_launcher.supervisor.policy import Decision, Policy, Rules
from mlx_launcher.supervisor.process import Server, describe_exit

PHASES = ("importing", "loading", "proving")

# The longest wait, after which everything is looked at even if no event came.
MAX_WAIT_S = 1.0
# How often to look whether the rest of a group is gone: nobody tells us.
GROUP_POLL_S = 0.03
# A wait that took this much longer than asked was a sleeping laptop or a Ctrl-Z.
GAP_S = 2.0
READ_BYTES = 65536
# What a server that just ended may have left in its pipe (64 KiB, or 1 MiB where somebody enlarged it).
LAST_READS = 16


class Supervisor:
    """Runs one plan from the first server to the final state. `run` returns the exit code.

    The working directory must be the instance's, its lock held, `listeners` bound (they are closed by the end); `wake` is
    the read end of what `signal.set_wakeup_fd` feeds. The constructor raises OSError without a control socket.
    """

    def __init__(
        self, plan: Plan, listeners: list[socket.socket], journal: Journal, wake: socket.socket, foreground: bool
    ) -> None:
        restart = plan["restart"]
        rules = Rules(
            restart["max_restarts"],
            restart["window_s"],
            restart["backoff_s"],
            restart["backoff_max_s"],
            plan["stop_timeout_s"],
        )
        self._plan = plan
        self._listeners = listeners
        self._journal = journal
        self._foreground = foreground
        self._policy = Policy(rules, random.random)
        self._log = RotatingFile(plan["log_file"], plan["log_max_bytes"])
        self._server: Server | None = None
        self._exit: str | None = None  # how the server's leader ended, while others of its group are left
        self._last_exit: dict[str, Any] | None = None
        self._beat: dict[str, Any] = {}
        self._progress: dict[str, int] | None = None
        self._stop_signals = 0
        self._troubles: dict[str, str | None] = {}
        self._shown: tuple[Any, ...] = ()
        self._headline = ""
        self._began = self._last_look = time.monotonic()
        self._now = 0.0
        self._pid_started = system.process_started(os.getpid())
        self._selector = selectors.DefaultSelector()
        self._control = ControlServer(self._selector, self._on_request)
        self._wake = wake
        self._selector.register(wake, selectors.EVENT_READ, self._on_signals)

    # -- the loop

    def run(self) -> int:
        self._journal.note(
            "started", pid=os.getpid(), port=self._plan["port"], hosts=[_host(s) for s in self._listeners]
        )
        self._say("listening on " + ", ".join(_host(s) for s in self._listeners) + f" port {self._plan['port']}")
        try:
            self._apply(self._policy.begin(self._now))
            while not self._policy.finished:
                self._look(self._wait_s())
        except Exception as error:
            self._journal.note("bug", error=repr(error), server=self._server and self._server.pid)
            self._policy.abandon(f"the supervisor failed: {error!r}")
            if self._server is not None:
                self._server.signal_group(signal.SIGTERM)
        self._end()
        return 0 if self._policy.state == "stopped" else 1

    def _wait_s(self) -> float:
        wait = MAX_WAIT_S
        if self._exit is not None:
            wait = GROUP_POLL_S
        if self._policy.deadline is not None:
            wait = min(wait, self._policy.deadline - self._now)
        return max(wait, 0.0)

    def _look(self, wait: float) -> None:
        events = self._selector.select(wait)
        # Our clock leaves gaps out: after them every deadline has as far to go as before.
        real = time.monotonic()
        elapsed, self._last_look = real - self._last_look, real
        self._now += elapsed if elapsed < wait + GAP_S else wait
        for key, mask in events:
            key.data(mask)
        self._on_tick(real)

    def _on_tick(self, real: float) -> None:
        self._control.expire(real)
        self._reap()
        if self._exit is not None and self._server is not None and not self._server.group_left():
            why = self._exit
            self._forget_server()
            self._apply(self._policy.emptied(self._now, why))
        self._apply(self._policy.tick(self._now))

    # -- signals and requests

    def _on_signals(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wake.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_stop_signal(signal.Signals(number).name)
                elif number == signal.SIGHUP:
                    self._journal.note("hangup_ignored", reason="reload comes with restart")
        # SIGCHLD only had to end the wait: _on_tick reaps.

    def _on_stop_signal(self, name: str) -> None:
        self._stop_signals += 1
        self._stop(self._plan["stop_timeout_s"] if self._stop_signals == 1 else 0.0, name)

    def _stop(self, drain_s: float, who: str) -> None:
        self._journal.note("stop", by=who, drain_s=drain_s)
        decisions = self._policy.stop(self._now, drain_s)
        self._close_listeners()
        self._apply(decisions)

    def _on_request(self, request: dict[str, Any]) -> Answer:
        do = request.get("do")
        if do == "status":
            return {"ok": True, "data": self._status()}
        if do == "stop":
            timeout_s = request.get("timeout_s", self._plan["stop_timeout_s"])
            if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 <= timeout_s < 1e9:
                return error_answer("bad_request", "timeout_s is a number of seconds")
            self._stop(float(timeout_s), "stop")
            return {"ok": True, "data": {"pid": os.getpid()}}
        return error_answer("bad_request", f"no request is called {do!r}", "Known: status, stop")

    # -- the server

    def _apply(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if decision.do == "spawn":
                self._spawn()
                continue
            self._journal.note(decision.do, reason=decision.why, server=self._server and self._server.pid)
            if self._server is None:
                continue
            if decision.do == "drain":
                self._send({"type": "drain"})
            elif decision.do == "term":
                self._send({"type": "stop"})
                self._server.signal_group(signal.SIGTERM)
            elif decision.do == "kill":
                self._server.signal_group(signal.SIGKILL)
        self._changed()

    def _spawn(self) -> None:
        self._forget_server()  # one that was given up: nothing ends it
        try:
            server = Server(self._plan["backend"], self._listeners)
        except (OSError, ValueError) as error:
            permanent = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ValueError)
            why = f"the server cannot be started: {error}"
            self._apply(self._policy.spawn_failed(self._now, why, permanent))
            return
        self._server, self._progress, self._beat = server, None, _between_servers(self._beat)
        self._journal.note("spawn", server=server.pid, restarts=self._policy.restarts)
        self._selector.register(server.output, selectors.EVENT_READ, self._on_output)
        self._selector.register(server.channel.sock, selectors.EVENT_READ, self._on_channel)
        self._apply(self._policy.spawned())
        self._send({"type": "activate", "settings": self._plan["backend"]["settings"]})

    def _send(self, message: dict[str, Any]) -> None:
        if self._server is not None:
            self._server.channel.send(message)
            self._watch_channel(self._server)

    def _watch_channel(self, server: Server) -> None:
        sock = server.channel.sock
        if sock not in self._selector.get_map():
            return
        if server.channel.ended:
            self._selector.unregister(sock)
            return
        write = selectors.EVENT_WRITE if server.channel.wants_to_write else 0
        self._selector.modify(sock, selectors.EVENT_READ | write, self._on_channel)

    def _on_output(self, _mask: int) -> None:
        if self._server is not None and not self._pump(self._server.output):
            self._selector.unregister(self._server.output)

    def _pump(self, fd: int) -> bool:
        """One read from the server's output into its log; False at its end."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return True
        if data:
            self._log.write(data)
            self._trouble("log", self._log.error)
        return bool(data)

    def _on_channel(self, mask: int) -> None:
        server = self._server
        if server is None:
            return
        if mask & selectors.EVENT_WRITE:
            server.channel.flush()
        if mask & selectors.EVENT_READ:
            self._receive(server)
        self._watch_channel(server)

    def _receive(self, server: Server) -> None:
        for message in server.channel.receive():
            self._on_message(message)
        self._trouble("channel", "lines that are too long or no JSON" if server.channel.dropped else None)

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "beat":
            self._beat = message
        elif kind == "phase" and message.get("phase") in PHASES:
            self._progress = _progress(message)
            self._apply(self._policy.progressed(message["phase"]))
        elif kind == "ready":
            self._progress = None
            self._journal.note("ready", server=self._server and self._server.pid, took_s=message.get("took_s"))
            self._apply(self._policy.ready(self._now))
        elif kind == "fault":
            parts = [str(message[key]).rstrip(".") for key in ("reason", "hint") if message.get(key)]
            why = ". ".join(parts) or "the server reported a fault"
            self._journal.note("fault", server=self._server and self._server.pid, reason=why)
            self._apply(self._policy.fault(self._now, why))

    def _reap(self) -> None:
        server = self._server
        if server is None or self._exit is not None:
            return
        code = server.exit_code()
        if code is None:
            return
        if server.channel.sock in self._selector.get_map():
            for _ in range(LAST_READS):  # a fault that it reported last counts
                if server.channel.ended:
                    break
                self._receive(server)
        why, signal_name = describe_exit(code)
        self._last_exit = {
            "at": utc_now(),
            "code": code if code >= 0 else None,
            "signal": signal_name,
            "reason": why,
        }
        left = server.group_left()
        self._journal.note("exit", server=server.pid, left=left, **self._last_exit)
        self._exit = why
        decisions = self._policy.exited(self._now, why, left)
        if not left:
            self._forget_server()
        self._apply(decisions)

    def _forget_server(self) -> None:
        """Lets go of a server of whose group nothing is left, once its last words are in the log."""
        server, self._server, self._exit, self._progress = self._server, None, None, None
        if server is None:
            return
        for watched in (server.output, server.channel.sock):
            if watched in self._selector.get_map():
                self._selector.unregister(watched)
        for _ in range(LAST_READS):
            if not self._pump(server.output):
                break
        server.close()

    # -- what others see

    def _status(self) -> dict[str, Any]:
        real = time.monotonic()
        server: status.ServerStatus | None = None
        if self._server is not None:
            server = {
                "pid": self._server.pid,
                "uptime_s": round(real - self._server.began, 1),
                "rss_bytes": self._beat.get("rss_bytes"),
                "restarts": self._policy.restarts,
                "last_exit": self._last_exit,
            }
        seen: status.Seen = {
            "state": self._policy.state,
            "phase": self._policy.phase,
            "progress": self._progress,
            "draining": self._policy.draining,
            "last_error": self._policy.last_error,
            "uptime_s": real - self._began,
            "rss_bytes": system.rss_bytes(os.getpid()),
            "server": server,
            "beat": self._beat,
            "events": list(self._journal.tail),
        }
        return status.build(self._plan, seen)

    def _changed(self) -> None:
        """Rewrites state.json and tells the terminal, if there is anything new to say."""
        policy, pid = self._policy, self._server and self._server.pid
        shown = (policy.state, policy.phase, policy.draining, policy.last_error, policy.finished, pid)
        data = self._status() if shown != self._shown or self._foreground else {}
        if shown != self._shown:
            self._shown = shown
            server = {"pid": pid, "started": self._server.started} if self._server else None
            self._trouble("state", status.write_state(self._pid_started, server, data))
        if self._foreground and (line := status.headline(data)) != self._headline:
            self._headline = line
            self._say(line)

    def _trouble(self, what: str, why: str | None) -> None:
        """Journals a trouble when it begins and when it is over, not at every write."""
        if self._troubles.get(what) != why:
            self._troubles[what] = why
            self._journal.note(f"{what}_trouble", reason=why or "over")

    def _say(self, line: str) -> None:
        # A terminal that was halted (Ctrl-S) or a reader that does not read must not halt the supervisor.
        with contextlib.suppress(OSError):
            if self._foreground and select.select([], [1], [], 0)[1]:
                os.write(1, line.encode() + b"\n")

    def _close_listeners(self) -> None:
        for sock in self._listeners:
            sock.close()

    def _end(self) -> None:
        self._close_listeners()
        self._forget_server()
        self._changed()
        self._control.close()
        self._log.close()
        self._selector.close()


def _host(sock: socket.socket) -> str:
    return str(sock.getsockname()[0])


def _between_servers(beat: dict[str, Any]) -> dict[str, Any]:
    """What stays true of the last beat when its server is gone: what lies on the disk."""
    return {"kv_cache": beat["kv_cache"]} if "kv_cache" in beat else {}


def _progress(message: dict[str, Any]) -> dict[str, int] | None:
    done, total = message.get("done"), message.get("total")
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        return {"done": min(max(done, 0), total), "total": total}
    return None
