"""Every rule about restarts, switches to another plan, and stopping. Pure: events and a time go in, decisions come out.

No clock, no I/O. Times are seconds on any clock that does not jump. At most one server is alive: between the decision to
spawn and `emptied` no other spawn is decided. After `finish` nothing is decided any more.

A new plan is on trial until its server is ready (`adopt`); if it fails before that, `revert` says that the next spawn is one of
the last plan that is known to be good.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

State = Literal["starting", "ready", "restarting", "failed", "stopped"]
Step = Literal["spawn", "silence", "fault", "drain", "term", "kill"]
Do = Literal["spawn", "wait", "drain", "term", "kill", "adopt", "revert", "finish"]

# A host that reported a fault exits by itself; this bounds a host that does not.
FAULT_EXIT_S = 5.0
# What may be left of a group whose leader is gone has no work to finish.
LEFTOVER_S = 2.0
# SIGKILL takes effect at once, except on a process in an uninterruptible system call.
KILL_WAIT_S = 10.0
JITTER = 0.1


class Rules(NamedTuple):
    """Seconds, and the number of crashes within `window_s` that are answered with a restart.

    `silence_s` bounds how long a plan on trial may show no progress while it starts; 0 is no bound.
    """

    max_restarts: int
    window_s: float
    backoff_s: float
    backoff_max_s: float
    stop_timeout_s: float
    silence_s: float


class Decision(NamedTuple):
    """What to do now: start a server, ask it to drain, SIGTERM or SIGKILL its group, or end the supervisor.

    `wait` asks for nothing: it says why and for how long nothing is started. `adopt`: the plan on trial is now the one known to
    be good. `revert`: from here on that of before is in force again.
    """

    do: Do
    why: str


class Policy:
    """What the supervisor believes, and what follows from each event. `jitter` gives numbers from 0 to 1."""

    def __init__(self, rules: Rules, jitter: Callable[[], float]) -> None:
        self.state: State = "starting"
        self.phase: str | None = None
        self.draining = False  # asked to stop
        self.trial: Literal["ending", "starting"] | None = (
            None  # of a new plan: the old server ends, the new one starts
        )
        self.finished = False
        self.restarts = 0
        self.last_error: str | None = None
        self.deadline: float | None = None  # when `tick` has something to say
        self._rules = self._good_rules = self._next_rules = rules
        self._jitter = jitter
        self._server: Literal["none", "alive", "leftover"] = "none"
        self._step: Step | None = None  # what `deadline` ends
        self._verdict: str | None = None  # why there will be no further restart
        self._reverted: str | None = None  # why the plan before is in force again, until it is ready
        self._crashes: list[float] = []  # in seconds of service, see _crash
        self._served_s = 0.0
        self._ready_at: float | None = None

    def begin(self, now: float) -> list[Decision]:
        """The first server."""
        return self._next("spawn", now)

    def spawned(self, now: float) -> list[Decision]:
        """A server process exists."""
        self._server, self.phase = "alive", "importing"
        if self.trial and self._rules.silence_s > 0:
            return self._next("silence", now + self._rules.silence_s)
        return []

    def spawn_failed(self, now: float, why: str, permanent: bool) -> list[Decision]:
        """No process came to be; `permanent` says that trying again cannot help."""
        if permanent:
            self._verdict = why
        return self.emptied(now, why)

    def progressed(self, now: float, phase: str | None = None) -> list[Decision]:
        """The server shows how far its start is, or, without a phase, only that it does something."""
        if self._server == "alive" and self._ready_at is None:
            self.phase = phase or self.phase
            if self._step == "silence":
                self.deadline = now + self._rules.silence_s
        return []

    def ready(self, now: float) -> list[Decision]:
        """The server proved that it generates."""
        if self._server == "alive" and self._ready_at is None and self._verdict is None:
            self._ready_at, self.phase = now, None
            if not self.draining and self.trial != "ending":
                return self._serves()
        return []

    def fault(self, now: float, why: str) -> list[Decision]:
        """The server says that it cannot work. Before it was ever ready that is final; afterwards its exit decides."""
        if self._server != "alive" or self._ready_at is not None or self._verdict is not None or self.trial == "ending":
            return []
        self._verdict = self.last_error = why
        return [] if self.draining else self._next("fault", now + FAULT_EXIT_S)

    def exited(self, now: float, why: str, left: bool) -> list[Decision]:
        """The server process is gone; `left` says that others of its group are not, and `emptied` will follow."""
        if self.finished:
            return []
        if self._ready_at is not None:
            self._served_s += now - self._ready_at
            self._ready_at = None
        self._server, self.phase = "leftover", None
        self.state = "stopped" if self.draining else "restarting"
        if not self.draining and self.trial != "ending":
            self.last_error = self._verdict or why
        if not left:
            return self.emptied(now, why)
        if self._step in ("term", "kill") and self.deadline is not None:
            self.deadline = min(self.deadline, now + LEFTOVER_S)
            return []
        return self._next("term", now + LEFTOVER_S, Decision("term", "processes of the group are left over"))

    def emptied(self, now: float, why: str) -> list[Decision]:
        """Nothing of the server's group is left. `why` is why the server ended."""
        if self.finished:
            return []
        self._server, self._step, self.deadline = "none", None, None
        if self.draining:
            return self._finish("stopped", "asked to stop")
        if self.trial == "ending":
            return self._start_trial(now)
        delay = None if self._verdict else self._crash(why)
        if delay is None:
            return self._give_up(now, self._verdict or why)
        self.state, self.last_error = "restarting", why
        self.restarts += 1
        return self._next("spawn", now + delay, Decision("wait", f"{why}; next start in {delay:.1f} s"))

    def switch(self, now: float, drain_s: float, rules: Rules) -> list[Decision]:
        """Put another plan, with its rules, in the place of the one in force; what is in flight has `drain_s` seconds.

        While `trial` is set, or after a stop, there is no other switch.
        """
        if self.finished or self.draining or self.trial:
            return []
        self.trial, self._next_rules = "ending", rules
        if self._server == "none":
            return self._start_trial(now)
        return [] if self._step == "fault" else self._end_server(now, drain_s, "another plan takes its place")

    def stop(self, now: float, drain_s: float) -> list[Decision]:
        """End in good order, with at most `drain_s` seconds for what is in flight. Asked again it can only shorten that."""
        if self.finished:
            return []
        self.draining, self.trial = True, None
        if self._server == "none":
            return self._finish("stopped", "asked to stop")
        return self._end_server(now, drain_s, "asked to stop")

    def abandon(self, why: str) -> None:
        """The supervisor itself cannot go on."""
        self._finish("failed", why)

    def tick(self, now: float) -> list[Decision]:
        """What is due."""
        if self.finished or self.deadline is None or now < self.deadline:
            return []
        if self._step == "spawn":
            self.deadline = self._step = None
            return [Decision("spawn", "due")]
        if self._step == "silence":
            self._verdict = self.last_error = (
                f"the server showed no progress for {self._rules.silence_s:g} s (hangTimeout)"
            )
            return self._term(now, self._verdict)
        if self._step == "fault":
            return self._term(now, "did not end after its fault")
        if self._step == "drain":
            return self._term(now, "requests were still in flight at the end of the drain")
        if self._step == "term":
            return self._next("kill", now + KILL_WAIT_S, Decision("kill", "did not end after SIGTERM"))
        if self._server == "leftover":
            return self.emptied(now, self.last_error or "asked to stop")
        return self._finish("failed", "the server does not end, not even after SIGKILL")

    def _end_server(self, now: float, drain_s: float, why: str) -> list[Decision]:
        """The way down for a server that is alive; it is gone on only as far as it has not been yet."""
        if self._server == "leftover" or self._step in ("term", "kill"):
            return []
        if self._ready_at is None or drain_s <= 0:
            return self._term(now, why)
        if self._step != "drain":
            return self._next("drain", now + drain_s, Decision("drain", why))
        self.deadline = min(self.deadline if self.deadline is not None else now, now + drain_s)
        return []

    def _start_trial(self, now: float) -> list[Decision]:
        self._rules, self.trial = self._next_rules, "starting"
        return self._start_anew(now)

    def _start_anew(self, now: float, *decisions: Decision) -> list[Decision]:
        """Starts another plan: what its predecessor did does not count against it."""
        self.state, self._verdict, self._crashes = "restarting", None, []
        return self._next("spawn", now, *decisions)

    def _serves(self) -> list[Decision]:
        self.state, self.last_error, self._reverted = "ready", None, None
        if self.trial is None:
            return []
        self.trial, self._step, self.deadline = None, None, None
        self._good_rules = self._rules
        return [Decision("adopt", "it proved itself")]

    def _give_up(self, now: float, why: str) -> list[Decision]:
        """No further restart of this plan: back to the one before if it is on trial, else the end."""
        if self.trial:
            self.trial, self._rules = None, self._good_rules
            self.last_error = self._reverted = why
            return self._start_anew(now, Decision("revert", why))
        if self._reverted:
            why = f"{why}. It was started again because its successor failed: {self._reverted}"
        return self._finish("failed", why)

    def _next(self, step: Step, at: float, *decisions: Decision) -> list[Decision]:
        self._step, self.deadline = step, at
        return list(decisions)

    def _term(self, now: float, why: str) -> list[Decision]:
        return self._next("term", now + self._rules.stop_timeout_s, Decision("term", why))

    def _crash(self, why: str) -> float | None:
        """Seconds to wait before the next start; None when the budget is spent.

        The window is counted in seconds of service, not of the clock: a server that takes minutes to load and then dies
        would otherwise never fill it, and be restarted for ever.
        """
        self._crashes = [at for at in self._crashes if at > self._served_s - self._rules.window_s]
        self._crashes.append(self._served_s)
        count = len(self._crashes)
        if count > self._rules.max_restarts:
            before = (
                f"{count} crashes within {self._rules.window_s:g} s of service, the last one: " if count > 1 else ""
            )
            self._verdict = before + why
            return None
        if count == 1:
            return 0.0
        delay = min(self._rules.backoff_s * 2.0 ** min(count - 2, 60), self._rules.backoff_max_s)
        return delay * (1 + JITTER * self._jitter())

    def _finish(self, state: State, why: str) -> list[Decision]:
        self.state, self.finished, self.draining = state, True, False
        self.phase = self.deadline = self._step = None
        if state == "failed":
            self.last_error = why
        return [Decision("finish", why)]
