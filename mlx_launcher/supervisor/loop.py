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
from mlx_launcher.supervisor import metrics, plans, status
from mlx_launcher.supervisor.changes import Changes
from mlx_launcher.supervisor.control import Answer, ControlServer, error_answer
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import Port, Watch
from mlx_launcher.supervisor.policy import Decision, Policy
from mlx_launcher.supervisor.process import Server
from mlx_launcher.supervisor.record import Record
from mlx_launcher.supervisor.requests import wrong
from mlx_launcher.supervisor.scrapes import Scrapes
from mlx_launcher.supervisor.standby import Standby
from mlx_launcher.supervisor.terminal import Terminal

PHASES = ("importing", "loading", "proving")

# The longest wait, after which everything is looked at even if no event came.
MAX_WAIT_S = 1.0
# How often to look whether the rest of a group is gone: nobody tells us.
GROUP_POLL_S = 0.03
# A wait that took this much longer than asked was a sleeping laptop or a Ctrl-Z.
GAP_S = 2.0


class Supervisor:
    """Runs one plan from the first server to the final state. `run` returns the exit code. With `idle`, a plan that unloads
    what is not used has its first server started by the first connection.

    The working directory must be the instance's, its lock held, `port` owned (it is released by the end); `wake` is the
    read end of what `signal.set_wakeup_fd` feeds. The constructor raises OSError without a control socket.
    """

    def __init__(
        self, plan: Plan, port: Port, journal: Journal, wake: socket.socket, terminal: Terminal, idle: bool = False
    ) -> None:
        self._changes = Changes(plan, journal, terminal)
        self._port = port
        self._journal = journal
        self._terminal = terminal
        self._policy = Policy(plans.rules(plan), random.random)
        self._server: Server | None = None
        self._exit: str | None = None  # how the server's leader ended, while others of its group are left
        self._record = Record()
        self._start_idle = idle and not plans.lends(plan["backend"])
        self._stop_signals = 0
        self._shown: tuple[Any, ...] = ()
        self._began = self._last_look = time.monotonic()
        self._now = 0.0
        self._pid_started = system.process_started(os.getpid())
        self._selector = selectors.DefaultSelector()
        self._standby = Standby(self._selector, journal, self._changes.write)
        self._watch = Watch(self._selector, port, self._on_connection)
        self._scrapes = Scrapes(self._selector, journal, self._metrics)
        self._scrapes.listen(plan["metrics_port"])
        self._control = ControlServer(self._selector, self._on_request)
        self._wake = wake
        self._selector.register(wake, selectors.EVENT_READ, self._on_signals)

    @property
    def _plan(self) -> Plan:
        return self._changes.plan

    # -- the loop

    def run(self) -> int:
        hosts = self._port.hosts()
        self._journal.note("started", pid=os.getpid(), port=self._plan["port"], hosts=hosts)
        self._changes.note_warnings()
        self._terminal.listening(f"{', '.join(hosts)} port {self._plan['port']}")
        try:
            self._apply(self._policy.begin(self._now, self._start_idle))
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
        self._terminal.notify.turned()
        self._control.expire(real)
        self._scrapes.expire(real)
        self._reap()
        if self._exit is not None and self._server is not None and not self._server.group_left():
            why = self._exit
            self._forget_server()
            self._apply(self._policy.emptied(self._now, why))
        if self._changes.again and not self._changes.under_way:
            self._changes.reload("SIGHUP", self._selector)
        if (plan := self._changes.poll()) is not None:
            self._switch_to(plan)
        if self._server is not None:
            self._server.poll(self._now)
        if self._terminal.caller_is_gone() and not self._policy.draining:
            self._journal.note("caller_gone")
            self._stop(0.0, "the caller's end")
        if self._policy.state == "starting":
            self._terminal.advise(self._now)
        self._changes.remind(self._now, self._policy.state == "degraded", self._status)
        self._tend_standby()
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
            self._changes.again = not self._policy.draining

    def _on_stop_signal(self, name: str) -> None:
        self._stop_signals += 1
        self._stop(self._plan["stop_timeout_s"] if self._stop_signals == 1 else 0.0, name)

    def _stop(self, drain_s: float, who: str) -> None:
        self._journal.note("stop", by=who, drain_s=drain_s)
        self._changes.stopped()
        decisions = self._policy.stop(self._now, self._drain_s(drain_s))
        self._watch.set(False)
        self._port.release()
        self._apply(decisions)

    def _drain_s(self, seconds: float) -> float:
        return seconds if self._server is None or self._server.drains else 0.0

    def _on_request(self, request: dict[str, Any]) -> Answer:
        if (answer := wrong(request, self._plan["stop_timeout_s"])) is not None:
            return answer
        do = request["do"]
        if do == "status":
            return {"ok": True, "data": self._status()}
        if do == "metrics":
            return {"ok": True, "data": {"content_type": metrics.CONTENT_TYPE, "text": self._metrics()}}
        if do == "stop":
            self._stop(float(request["timeout_s"]), "stop")
            return {"ok": True, "data": {"pid": os.getpid(), "stop_timeout_s": self._plan["stop_timeout_s"]}}
        if self._policy.draining:
            return error_answer("stopping", "the server is stopping", "Start it again with mlx-launch start")
        if self._changes.under_way:
            return error_answer("busy", "a restart is under way already", "See mlx-launch status")
        if do == "switch":
            return self._on_switch(request)
        return {"ok": True, "data": {"reload_id": self._changes.reload("restart", self._selector)}}

    # -- another server

    def _switch_to(self, plan: Plan, to_fallback: bool = False) -> None:
        drain_s = self._drain_s(self._plan["stop_timeout_s"])
        self._apply(self._policy.switch(self._now, drain_s, plans.rules(plan), to_fallback))

    def _on_switch(self, request: dict[str, Any]) -> Answer:
        to_fallback = request["to"] == "fallback"
        if to_fallback and self._plan["fallback"] is None:
            hint = 'Give the backend a "fallback" in the configuration, then mlx-launch restart'
            return error_answer("no_fallback", "this server has no fallback", hint)
        there = to_fallback is self._policy.on_fallback and self._policy.state in ("ready", "degraded")
        number = self._changes.switch(
            to_fallback and not self._policy.on_fallback, request["reason"], request.get("automatic") is True
        )
        if there:
            self._changes.end("done")
        else:
            self._switch_to(self._plan, to_fallback)
        return {"ok": True, "data": {"reload_id": number}}

    def _on_connection(self) -> None:
        """Nobody accepts it before the server that it starts."""
        self._apply(self._policy.wanted(self._now))

    # -- the server

    def _apply(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if decision.do == "spawn":
                self._spawn()
                continue
            if decision.do == "look":
                if self._server is not None:
                    self._journal.trouble("answers", decision.why)
                    self._apply(self._policy.looked(self._now, self._server.cpu_s()))
                continue
            if decision.do == "idle":
                self._record.unloads(self._now)
            event = decision.do.removesuffix("_asleep")
            self._journal.note(event, reason=decision.why, server=self._server and self._server.pid)
            self._changes.decided(decision)
            if self._server is not None:
                self._server.end(decision.do)
        self._watch.set(self._policy.asleep)
        self._changed()

    def _spawn(self) -> None:
        self._forget_server()  # one that was given up: nothing ends it
        self._changes.take()
        self._scrapes.follow(self._plan["metrics_port"])
        backend = plans.backend(self._plan, self._policy.on_fallback)
        try:
            self._port.own()
            self._journal.trouble("port", None)
            if plans.lends(backend):
                self._standby.close()  # it holds the listeners
                self._port.release()
            waiting = self._standby.take(self._now, backend, self._on_message, self._on_output)
            server = waiting or Server(
                self._plan, backend, self._port.sockets, self._selector, self._on_message, self._on_output
            )
        except LaunchError as error:
            self._apply(self._policy.spawn_failed(self._now, error.message, permanent=False))
            return
        except (OSError, ValueError) as error:
            permanent = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ValueError)
            why = f"the server cannot be started: {error}"
            self._regain_port()
            self._apply(self._policy.spawn_failed(self._now, why, permanent))
            return
        self._server = server
        self._record.begins(self._now, self._policy.cause)
        self._journal.note(
            "spawn", server=server.pid, restarts=self._policy.restarts, backend=backend["name"], standby=bool(waiting)
        )
        self._apply(self._policy.spawned(self._now, outside=plans.lends(backend)))
        server.send({"type": "activate", "settings": backend["settings"]})

    def _on_output(self, data: bytes) -> None:
        self._changes.log.write(data)
        self._journal.trouble("log", self._changes.log.error)
        self._policy.progressed(self._now)

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        self._journal.trouble(
            "channel", "lines that are too long or no JSON" if self._server and self._server.dropped else None
        )
        if kind == "beat":
            self._record.hear(message)
            self._journal.trouble("answers", None)
            self._apply(self._policy.beat(self._now, message))
        elif kind == "answered":
            self._journal.trouble("answers", None)
            self._policy.answered(self._now)
        elif kind == "refused":
            self._apply(self._policy.refused(self._now))
        elif kind == "phase" and message.get("phase") in PHASES:
            self._apply(self._policy.progressed(self._now, message["phase"], self._record.phase(message)))
        elif kind == "unproved":
            self._journal.trouble("proof", message["reason"])
            self._policy.unproved(message["reason"])
        elif kind == "ready" and self._server is not None:
            self._server.proved()
            self._journal.note("ready", server=self._server.pid, took_s=self._record.ready(self._now))
            self._apply(self._policy.ready(self._now))
        elif kind == "dying":
            self._policy.dying(self._record.says(message), message.get("frozen") is True)
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
        why = self._exit = self._record.exits(code, self._policy.ending or self._policy.unloading)
        left = server.group_left()
        self._journal.note("exit", server=server.pid, left=left, **(self._record.last_exit or {}))
        decisions = self._policy.exited(self._now, why, left)
        if not left:
            self._forget_server()
        self._apply(decisions)

    def _tend_standby(self) -> None:
        spare, backend = self._policy.spare, plans.backend(self._plan, self._policy.on_fallback)
        fits = spare != "unwanted" and self._plan["standby"] and not plans.lends(backend)
        self._standby.tick(self._now, spare == "wanted", self._plan, backend if fits else None, self._port.sockets)

    def _forget_server(self) -> None:
        """Lets go of a server of whose group nothing is left, once its last words are in the log."""
        server, self._server, self._exit, self._record.progress = self._server, None, None, None
        if server is not None:
            server.close()
        self._regain_port()

    def _regain_port(self) -> None:
        """After it was lent: clients wait in the queue and no stranger gets in until the next server is started.

        Who still waits when it is lent again is cut off, as if refused.
        """
        if not self._policy.finished and not self._policy.draining:
            self._journal.trouble("port", self._port.regain())

    # -- what others see

    def _status(self) -> dict[str, Any]:
        seen: status.Seen = {
            "state": self._policy.state,
            "phase": self._policy.phase,
            "progress": self._record.progress,
            "draining": self._policy.drains,
            "last_error": self._policy.last_error,
            "uptime_s": time.monotonic() - self._began,
            "rss_bytes": system.rss_bytes(os.getpid()),
            "server": self._record.server(self._server, self._policy.restarts),
            "standby": self._standby.seen(),
            "start_s": self._record.start_s,
            "service": self._terminal.service,
            "listener": self._listener(),
            "on_fallback": self._policy.on_fallback,
            "rollback": self._changes.rollback,
            "reload": self._changes.seen,
            "beat": self._record.activity(self._now, self._policy.state == "idle"),
            "metrics": self._scrapes.seen,
            "events": list(self._journal.tail),
        }
        return {**status.build(self._plan, seen), "config": plans.config_file(self._plan)}

    def _metrics(self) -> str:
        return metrics.render(self._status(), self._record.totals.seen(), self._record.restarts)

    def _listener(self) -> str:
        lends = plans.lends(plans.backend(self._plan, self._policy.on_fallback))
        return "lent" if lends and not self._port.sockets else "owned"

    def _changed(self) -> None:
        """Rewrites state.json and tells the terminal, if there is anything new to say."""
        policy, pid = self._policy, self._server and self._server.pid
        reload = self._changes.seen and self._changes.seen["state"]
        shown: tuple[Any, ...] = (policy.state, policy.phase, policy.draining, policy.trial, policy.last_error)
        shown += (policy.finished, pid, self._standby.pid, reload)
        data = self._status() if shown != self._shown or self._terminal.wanted else {}
        if shown != self._shown:
            self._shown = shown
            server = self._server.remembered() if self._server else None
            standby = self._standby.remembered()
            self._journal.trouble("state", status.write_state(self._pid_started, server, standby, data))
        if self._terminal.wanted:
            self._terminal.show(status.headline(data))

    def _end(self) -> None:
        self._watch.set(False)
        self._port.release()
        self._standby.close()
        self._forget_server()
        self._changed()
        if self._policy.state == "failed":
            self._terminal.show_log(self._plan["log_file"])
        self._control.close()
        self._scrapes.close()
        self._changes.close()
        self._selector.close()
