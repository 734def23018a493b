"""The loop that owns all state: one thread, one `selectors` wait, one function per event."""

import contextlib
import os
import random
import selectors
import signal
import socket
import time
from typing import Any

from mlx_launcher import system
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Plan
from mlx_launcher.supervisor import plans, status
from mlx_launcher.supervisor.control import Answer, ControlServer, error_answer
from mlx_launcher.supervisor.journal import Journal, RotatingFile, utc_now
from mlx_launcher.supervisor.listener import Port
from mlx_launcher.supervisor.policy import Decision, Policy
from mlx_launcher.supervisor.process import Server, describe_exit
from mlx_launcher.supervisor.reload import Refusal, Reload, misplaced
from mlx_launcher.supervisor.terminal import Terminal

PHASES = ("importing", "loading", "proving")

# The longest wait, after which everything is looked at even if no event came.
MAX_WAIT_S = 1.0
# How often to look whether the rest of a group is gone: nobody tells us.
GROUP_POLL_S = 0.03
# A wait that took this much longer than asked was a sleeping laptop or a Ctrl-Z.
GAP_S = 2.0


class Supervisor:
    """Runs one plan from the first server to the final state. `run` returns the exit code.

    The working directory must be the instance's, its lock held, `port` owned (it is released by the end); `wake` is the
    read end of what `signal.set_wakeup_fd` feeds. The constructor raises OSError without a control socket.
    """

    def __init__(self, plan: Plan, port: Port, journal: Journal, wake: socket.socket, terminal: Terminal) -> None:
        self._plan = self._good_plan = plan
        self._next_plan: Plan | None = None  # takes its place when the server has ended
        self._reload: Reload | None = None
        self._reload_again = False  # somebody asked while one was under way
        self._port = port
        self._journal = journal
        self._terminal = terminal
        self._policy = Policy(plans.rules(plan), random.random)
        self._log = RotatingFile(plan["log_file"], plan["log_max_bytes"])
        self._server: Server | None = None
        self._exit: str | None = None  # how the server's leader ended, while others of its group are left
        self._last_exit: dict[str, Any] | None = None
        self._beat: dict[str, Any] = {}
        self._progress: dict[str, int] | None = None
        self._stop_signals = 0
        self._shown: tuple[Any, ...] = ()
        self._began = self._last_look = time.monotonic()
        self._now = 0.0
        self._pid_started = system.process_started(os.getpid())
        self._selector = selectors.DefaultSelector()
        self._control = ControlServer(self._selector, self._on_request)
        self._wake = wake
        self._selector.register(wake, selectors.EVENT_READ, self._on_signals)

    # -- the loop

    def run(self) -> int:
        hosts = self._port.hosts()
        self._journal.note("started", pid=os.getpid(), port=self._plan["port"], hosts=hosts)
        self._note_warnings()
        self._terminal.say(f"listening on {', '.join(hosts)} port {self._plan['port']}")
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
        for due in (self._policy.deadline, self._server.due if self._server else None):
            if due is not None:
                wait = min(wait, due - self._now)
        return max(wait, 0.0)

    def _look(self, wait: float) -> None:
        events = self._selector.select(wait)
        # Our clock leaves gaps out: after them every deadline has as far to go as before.
        real = time.monotonic()
        elapsed, self._last_look = real - self._last_look, real
        self._now += elapsed if 0 <= elapsed < wait + GAP_S else wait
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
        if self._reload_again and not (self._reload and self._reload.under_way):
            self._begin_reload("SIGHUP")
        if self._reload is not None and (outcome := self._reload.poll()) is not None:
            self._on_planned(self._reload, outcome)
        if self._server is not None:
            self._server.poll(self._now)
        if self._terminal.caller_is_gone() and not self._policy.draining:
            self._journal.note("caller_gone")
            self._stop(0.0, "the caller's end")
        if self._policy.state == "starting":
            self._terminal.advise(self._now)
        self._apply(self._policy.tick(self._now))

    # -- signals and requests

    def _on_signals(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wake.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_stop_signal(signal.Signals(number).name)
                elif number == signal.SIGHUP:
                    self._on_hangup()
        # SIGCHLD only had to end the wait: _on_tick reaps.

    def _on_hangup(self) -> None:
        if self._terminal.is_gone():
            self._on_stop_signal("SIGHUP of a closed terminal")
        else:
            self._reload_again = not self._policy.draining

    def _on_stop_signal(self, name: str) -> None:
        self._stop_signals += 1
        self._stop(self._plan["stop_timeout_s"] if self._stop_signals == 1 else 0.0, name)

    def _stop(self, drain_s: float, who: str) -> None:
        self._journal.note("stop", by=who, drain_s=drain_s)
        self._reload_again = False
        if self._reload is not None and self._reload.under_way:
            self._reload.abandon()
            self._reload.ended("refused", Refusal("the server was asked to stop", ""))
        decisions = self._policy.stop(self._now, self._drain_s(drain_s))
        self._port.release()
        self._apply(decisions)

    def _drain_s(self, seconds: float) -> float:
        return seconds if self._server is None or self._server.drains else 0.0

    def _on_request(self, request: dict[str, Any]) -> Answer:
        do = request.get("do")
        if do == "status":
            return {"ok": True, "data": self._status()}
        if do == "stop":
            timeout_s = request.get("timeout_s", self._plan["stop_timeout_s"])
            if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 <= timeout_s < 1e9:
                return error_answer("bad_request", "timeout_s is a number of seconds")
            self._stop(float(timeout_s), "stop")
            return {"ok": True, "data": {"pid": os.getpid(), "stop_timeout_s": self._plan["stop_timeout_s"]}}
        if do == "restart":
            if self._policy.draining:
                return error_answer("stopping", "the server is stopping", "Start it again with mlx-launch start")
            if self._reload is not None and self._reload.under_way:
                return error_answer("busy", "a restart is under way already", "See mlx-launch status")
            return {"ok": True, "data": {"reload_id": self._begin_reload("restart")}}
        return error_answer("bad_request", f"no request is called {do!r}", "Known: status, stop, restart")

    # -- another plan

    def _begin_reload(self, trigger: str) -> int:
        number = self._reload.seen["id"] + 1 if self._reload else 1
        self._reload_again = False
        self._journal.note("reload", id=number, trigger=trigger)
        self._reload = Reload(number, trigger, self._plan["source"], self._selector, self._log.write)
        self._terminal.say("planning")
        return number

    def _on_planned(self, reload: Reload, outcome: Plan | Refusal) -> None:
        if not isinstance(outcome, Refusal):
            outcome = misplaced(self._plan, outcome) or outcome
        if isinstance(outcome, Refusal):
            self._end_reload("refused", outcome)
            return
        reload.seen["changes"] = plans.changes(self._plan, outcome)
        for change in reload.seen["changes"]:
            self._journal.note("plan_change", change=change)
        if reload.seen["trigger"] == "SIGHUP" and plans.same_server(self._plan, outcome):
            self._end_reload("done")
            return
        reload.seen["state"] = "switching"
        self._next_plan = outcome
        drain_s = self._drain_s(self._plan["stop_timeout_s"])
        self._apply(self._policy.switch(self._now, drain_s, plans.rules(outcome)))

    def _end_reload(self, state: str, refusal: Refusal | None = None) -> None:
        if self._reload is not None and self._reload.under_way:
            self._reload.ended(state, refusal)
            reason = refusal.reason if refusal else None
            self._journal.note(f"reload_{state}", reason=reason)
            self._terminal.say(f"restart {state}: {reason}" if reason else f"restart {state}")

    def _use(self, plan: Plan) -> None:
        self._plan = plan
        self._log.close()
        self._log = RotatingFile(plan["log_file"], plan["log_max_bytes"])
        self._note_warnings()

    def _note_warnings(self) -> None:
        for text in plans.notes(self._plan):
            self._journal.note("warning", text=text)

    # -- the server

    def _apply(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if decision.do == "spawn":
                self._spawn()
                continue
            self._journal.note(decision.do, reason=decision.why, server=self._server and self._server.pid)
            if decision.do == "adopt":
                self._good_plan = self._plan
                self._end_reload("done")
            elif decision.do == "revert":
                self._next_plan = self._good_plan
                self._end_reload(
                    "reverted", Refusal(decision.why, "The last configuration that worked is in force again")
                )
            elif self._server is None:
                continue
            elif decision.do == "drain":
                self._server.send({"type": "drain"})
            elif decision.do == "term":
                self._server.send({"type": "stop"})
                self._server.signal_group(signal.SIGTERM)
            elif decision.do == "kill":
                self._server.signal_group(signal.SIGKILL)
        self._changed()

    def _spawn(self) -> None:
        self._forget_server()  # one that was given up: nothing ends it
        if self._next_plan is not None:
            self._use(self._next_plan)
            self._next_plan = None
        try:
            self._port.own()
            self._journal.trouble("port", None)
            if plans.lends(self._plan):
                self._port.release()
            server = Server(self._plan, self._port.sockets, self._selector, self._on_message, self._on_output)
        except LaunchError as error:
            self._apply(self._policy.spawn_failed(self._now, error.message, permanent=False))
            return
        except (OSError, ValueError) as error:
            permanent = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ValueError)
            why = f"the server cannot be started: {error}"
            self._regain_port()
            self._apply(self._policy.spawn_failed(self._now, why, permanent))
            return
        self._server, self._progress, self._beat = server, None, status.between_servers(self._beat)
        self._journal.note("spawn", server=server.pid, restarts=self._policy.restarts)
        self._apply(self._policy.spawned(self._now))
        server.send({"type": "activate", "settings": self._plan["backend"]["settings"]})

    def _on_output(self, data: bytes) -> None:
        self._log.write(data)
        self._journal.trouble("log", self._log.error)
        self._policy.progressed(self._now)

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        self._journal.trouble(
            "channel", "lines that are too long or no JSON" if self._server and self._server.dropped else None
        )
        if kind == "beat":
            self._beat = message
        elif kind == "phase" and message.get("phase") in PHASES:
            self._progress = status.progress(message)
            self._apply(self._policy.progressed(self._now, message["phase"]))
        elif kind == "unproved":
            self._journal.trouble("proof", message["reason"])
        elif kind == "ready" and self._server is not None:
            self._progress = None
            self._server.proved()
            self._journal.note("ready", server=self._server.pid, took_s=message.get("took_s"))
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
        server.hear_last_words()
        self._last_exit = {"at": utc_now(), **describe_exit(code)}
        why = self._exit = self._last_exit["reason"]
        left = server.group_left()
        self._journal.note("exit", server=server.pid, left=left, **self._last_exit)
        decisions = self._policy.exited(self._now, why, left)
        if not left:
            self._forget_server()
        self._apply(decisions)

    def _forget_server(self) -> None:
        """Lets go of a server of whose group nothing is left, once its last words are in the log."""
        server, self._server, self._exit, self._progress = self._server, None, None, None
        if server is not None:
            server.close()
        self._regain_port()

    def _regain_port(self) -> None:
        """After it was lent: clients wait in the queue and no stranger gets in until the next server is started.

        Who still waits when it is lent again is cut off, as if refused.
        """
        if not self._policy.finished and not self._policy.draining:
            try:
                self._port.own()
            except LaunchError as error:
                self._journal.trouble("port", error.message)

    # -- what others see

    def _status(self) -> dict[str, Any]:
        real = time.monotonic()
        server: status.ServerStatus | None = None
        if self._server is not None:
            server = {
                "pid": self._server.pid,
                "uptime_s": round(real - self._server.began, 1),
                "rss_bytes": self._beat.get("rss_bytes") if self._server.drains else system.rss_bytes(self._server.pid),
                "restarts": self._policy.restarts,
                "last_exit": self._last_exit,
            }
        seen: status.Seen = {
            "state": self._policy.state,
            "phase": self._policy.phase,
            "progress": self._progress,
            "draining": self._policy.draining or self._policy.trial == "ending",
            "last_error": self._policy.last_error,
            "uptime_s": real - self._began,
            "rss_bytes": system.rss_bytes(os.getpid()),
            "server": server,
            "listener": "lent" if plans.lends(self._plan) and not self._port.sockets else "owned",
            "reload": self._reload.seen if self._reload else None,
            "beat": self._beat,
            "events": list(self._journal.tail),
        }
        return status.build(self._plan, seen)

    def _changed(self) -> None:
        """Rewrites state.json and tells the terminal, if there is anything new to say."""
        policy, pid = self._policy, self._server and self._server.pid
        reload = self._reload and self._reload.seen["state"]
        shown = (
            policy.state,
            policy.phase,
            policy.draining,
            policy.trial,
            policy.last_error,
            policy.finished,
            pid,
            reload,
        )
        data = self._status() if shown != self._shown or self._terminal.wanted else {}
        if shown != self._shown:
            self._shown = shown
            server = self._server.remembered() if self._server else None
            self._journal.trouble("state", status.write_state(self._pid_started, server, data))
        if self._terminal.wanted:
            self._terminal.show(status.headline(data))

    def _end(self) -> None:
        self._port.release()
        self._forget_server()
        if self._reload is not None:
            self._reload.abandon()
        self._changed()
        if self._policy.state == "failed":
            self._terminal.show_log(self._plan["log_file"])
        self._control.close()
        self._log.close()
        self._selector.close()
