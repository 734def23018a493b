"""Every rule about restarts, hangs, rollback, switches to another plan, idleness and stopping. Pure: events and a time go in,
decisions come out.

No clock, no I/O. Times are seconds on any clock that does not jump. At most one server is alive: between the decision to
spawn and `emptied` no other spawn is decided. After `finish` nothing is decided any more.

A new plan, or the other backend of the same plan, is on trial until its server is ready (`adopt`); if it fails before that,
`revert` says that the next spawn is one of what is known to be good. A plan that fails and is not on trial goes on with its
fallback, if it has one (`rollback`).

A host without work for `idle_s` is ended in good order, and none is started before somebody connects (`asleep`, `wanted`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mlx_launcher.supervisor.liveness import Silence, Work, number, unused_s
from mlx_launcher.supervisor.rules import Budget, Cause, Rules

State = Literal["starting", "ready", "idle", "degraded", "restarting", "failed", "stopped"]
Step = Literal["spawn", "watch", "fault", "drain", "term", "kill"]
Do = Literal[
    "spawn",
    "wait",
    "look",
    "drain",
    "term",
    "term_asleep",
    "kill",
    "adopt",
    "revert",
    "rollback",
    "idle",
    "wake",
    "finish",
]

# A host that reported a fault exits by itself; this bounds a host that does not.
FAULT_EXIT_S = 5.0
# What may be left of a group whose leader is gone has no work to finish.
LEFTOVER_S = 2.0
# SIGKILL takes effect at once, except on a process in an uninterruptible system call.
KILL_WAIT_S = 10.0
# A process that is stopped cannot see SIGTERM, and one that is deadlocked seldom does anything about it.
FROZEN_TERM_S = 5.0


class Decision(NamedTuple):
    """What to do now: start a server, ask it to drain, SIGTERM or SIGKILL its group, or end the supervisor.

    `wait` asks for nothing: it says why and for how long nothing is started. `look` asks what the group has used of the
    processor (`looked`). `term_asleep` is a SIGTERM that does not wake who is stopped: else it would take up connections that its
    successor can answer. `adopt`: what was on trial is now known to be good. `revert`: from here on that of before is in force
    again. `rollback`: the next server is the fallback. `idle`: nothing runs before somebody connects, who is why to `wake`.
    """

    do: Do
    why: str


class Policy:
    """What the supervisor believes, and what follows from each event. `jitter` gives numbers from 0 to 1."""

    def __init__(self, rules: Rules, jitter: Callable[[], float]) -> None:
        self.state: State = "starting"
        self.phase: str | None = None
        self.draining = False  # asked to stop
        # Of a new plan: the old server ends, the new one starts.
        self.trial: Literal["ending", "starting"] | None = None
        self.on_fallback = False  # which backend of the plan runs, or is started next
        self.finished = False
        self.restarts = 0
        self.cause: Cause = "crash"  # why the next server is started
        self.last_error: str | None = None
        self.ending: str | None = None  # why the server that runs is being replaced
        self.unloading: str | None = None  # why it is ended, with no other in its place before somebody asks
        self.deadline: float | None = None  # when `tick` has something to say
        self._rules = self._good_rules = self._next_rules = rules
        self._server: Literal["none", "alive", "leftover"] = "none"
        self._step: Step | None = None  # what `deadline` ends
        self._silence = Silence(0.0, 0.0, by_cpu=False)
        self._work = Work()
        self._outside = False  # the server has no channel
        self._shown: tuple[str | None, int | None] = (None, None)  # how far its start was
        self._unproved: str | None = None  # what is wrong with its answers
        self._verdict: str | None = None  # why there will be no further restart
        self._reverted: str | None = None  # why the plan before is in force again, until it is ready
        self._rolled_back: str | None = None  # why the fallback runs, where that was not asked for
        self._good_on_fallback = self._next_on_fallback = False
        self._budget = Budget(jitter)
        self._ready_at: float | None = None

    @property
    def drains(self) -> bool:
        """Whether the server is asked to end, in good order, for a stop, another plan, or a successor."""
        return self.draining or self.trial == "ending" or (self.ending is not None and self._server == "alive")

    @property
    def asleep(self) -> bool:
        """Whether nothing runs and nothing is due: somebody who connects has to be told of (`wanted`)."""
        return self.state == "idle" and self._server == "none"

    @property
    def spare(self) -> Literal["wanted", "kept", "unwanted"]:
        """What becomes of a standby. `kept`: one that is there may be the next server, but none is started now."""
        if self.finished or self.draining or self.trial or self.unloading or self.state == "idle":
            return "unwanted"
        return "wanted" if self._ready_at is not None and self._step == "watch" else "kept"

    def begin(self, now: float, idle: bool = False) -> list[Decision]:
        """The first server; with `idle`, if the rules know idleness, not before somebody connects."""
        if idle and self._rules.idle_s > 0:
            return self._sleep("nothing is loaded before it is asked for")
        return self._next("spawn", now)

    def wanted(self, now: float) -> list[Decision]:
        """Somebody has connected while nothing runs."""
        if not self.asleep:
            return []
        self.state, self.cause = "starting", "demand"
        return self._next("spawn", now, Decision("wake", "somebody connected"))

    def spawned(self, now: float, outside: bool = False) -> list[Decision]:
        """A server process exists; `outside`: it has no channel, and is judged by what it answers."""
        self._server, self.phase, self._outside = "alive", "importing", outside
        # An import shows no progress of its own.
        self._silence, self._work = Silence(now, self._rules.hang_s, by_cpu=True), Work()
        self._shown, self._unproved, self.cause = (None, None), None, "crash"
        return self._watch()

    def spawn_failed(self, now: float, why: str, permanent: bool) -> list[Decision]:
        """No process came to be; `permanent` says that trying again cannot help."""
        if permanent:
            self._verdict = why
        return self.emptied(now, why)

    def progressed(self, now: float, phase: str | None = None, done: int | None = None) -> list[Decision]:
        """The server shows how far its start is, or, without a phase, only that it does something."""
        if self._server != "alive" or self._ready_at is not None:
            return []
        self.phase = phase or self.phase
        self._silence.by_cpu = self._outside or self.phase == "importing"
        shown, self._shown = self._shown, (phase, done) if phase else self._shown
        # What a server without a channel writes while it is asked for a token may be no more than that it is asked.
        moved = shown != self._shown if phase else not (self._outside and self.phase == "proving")
        return self._heard(now) if moved else []

    def ready(self, now: float) -> list[Decision]:
        """The server proved that it generates."""
        if self._server == "alive" and self._ready_at is None and self._verdict is None and self.ending is None:
            self._ready_at, self.phase = now, None
            if not self.draining and self.trial != "ending":
                return self._serves(now)
        return []

    def unproved(self, why: str) -> None:
        """The server answers, but not with a token."""
        self._unproved = why

    def dying(self, why: str, frozen: bool) -> None:
        """The server says that it will end by itself; what is done about it is decided when it has."""
        if self._server == "alive" and not self.draining and self.ending is None:
            self.last_error, self.cause = why, "freeze" if frozen else "crash"

    def beat(self, now: float, beat: dict[str, Any]) -> list[Decision]:
        """A host's report of its work."""
        if self._step == "drain" and self.unloading:
            # Who came in between is answered, however long that takes, as long as it gets on.
            if self._work.seen(now, beat) and not unused_s(beat):
                self.deadline = now + self._rules.stop_timeout_s
            return []
        if self._step != "watch":
            return []
        moved = self._work.seen(now, beat)
        if self._ready_at is None:
            return self._heard(now) if moved else []
        self._heard(now)
        limit, used = self._rules.memory_limit_bytes, number(beat.get("rss_bytes"))
        if limit is not None and used > limit:
            why = f"the server uses {used:,} bytes of memory, more than its limit of {limit:,} (memoryLimit)"
            return self._replace("memory", why, self._end_server(now, self._rules.stop_timeout_s, why))
        if 0 < self._rules.hang_s <= self._work.still_s(now):
            why = f"the server hung: requests in flight, and no progress for {self._rules.hang_s:g} s (hangTimeout)"
            return self._replace("hang", why, self._term(now, why))
        if 0 < self._rules.idle_s <= min(unused_s(beat), now - self._ready_at):
            self.unloading = f"no work for {self._rules.idle_s:g} s (idleTimeout)"
            return self._end_server(now, self._rules.stop_timeout_s, self.unloading)
        return []

    def answered(self, now: float) -> list[Decision]:
        """A server without a channel answered something."""
        return self._heard(now) if self._ready_at is not None else []

    def refused(self, now: float) -> list[Decision]:
        """A server without a channel does not accept connections any more."""
        if self._step != "watch" or self._ready_at is None:
            return []
        why = "the server refuses connections, although its process runs"
        return self._replace("crash", why, self._term(now, why))

    def looked(self, now: float, cpu_s: float | None) -> list[Decision]:
        """What the server's group has used of the processor until now, in seconds; None where that is not known."""
        if self._step != "watch" or self.deadline is None or now < self.deadline:
            return []
        if self._silence.looked(now, cpu_s):
            return self._silent(now)
        return self._watch()

    def fault(self, now: float, why: str) -> list[Decision]:
        """The server says that it cannot work. Before it was ever ready that is final; afterwards its exit decides."""
        if self._server != "alive" or self._ready_at is not None or self._verdict is not None or self.trial == "ending":
            return []
        if self.ending is not None:
            return []
        self._verdict = self.last_error = why
        return [] if self.draining else self._next("fault", now + FAULT_EXIT_S)

    def exited(self, now: float, why: str, left: bool) -> list[Decision]:
        """The server process is gone; `left` says that others of its group are not, and `emptied` will follow."""
        if self.finished:
            return []
        why = self.ending or why
        if self._ready_at is not None:
            self._budget.served(now - self._ready_at)
            self._ready_at = None
        self._server, self.phase = "leftover", None
        self.state = "stopped" if self.draining else "idle" if self.unloading else "restarting"
        if not self.draining and not self.unloading and self.trial != "ending":
            self.last_error = self._verdict or why
        if not left:
            return self.emptied(now, why)
        if self._step in ("term", "kill") and self.deadline is not None:
            self.deadline = min(self.deadline, now + LEFTOVER_S)
            return []
        return self._next("term", now + LEFTOVER_S, Decision("term", "processes of the group are left over"))

    def emptied(self, now: float, why: str) -> list[Decision]:
        """Nothing of the server's group is left. `why` is why the server ended."""
        if self.finished or self.asleep or self._step == "spawn":  # what was given up is gone at last
            return []
        self._server, self._step, self.deadline = "none", None, None
        why, self.ending = self.ending or why, None
        if self.draining:
            return self._finish("stopped", "asked to stop")
        if self.trial == "ending":
            return self._start_trial(now)
        if self.unloading:
            return self._sleep(self.unloading)
        delay = None if self._verdict else self._budget.crash(self._rules)
        if delay is None:
            self._verdict = self._verdict or self._budget.verdict(self._rules, why)
            return self._give_up(now, self._verdict)
        self.state, self.last_error = "restarting", why
        self.restarts += 1
        return self._next("spawn", now + delay, Decision("wait", f"{why}; next start in {delay:.1f} s"))

    def switch(self, now: float, drain_s: float, rules: Rules, to_fallback: bool = False) -> list[Decision]:
        """Put another plan, with its rules, or the other backend of the same plan, in the place of what runs.

        What is in flight has `drain_s` seconds. While `trial` is set, or after a stop, there is no other switch.
        """
        if self.finished or self.draining or self.trial:
            return []
        self.trial, self._next_rules, self._next_on_fallback = "ending", rules, to_fallback
        self.unloading = None
        if self._server == "none":
            return self._start_trial(now)
        return [] if self._step == "fault" else self._end_server(now, drain_s, "another server takes its place")

    def stop(self, now: float, drain_s: float) -> list[Decision]:
        """End in good order, with at most `drain_s` seconds for what is in flight. Asked again it can only shorten that."""
        if self.finished:
            return []
        self.draining, self.trial, self.unloading = True, None, None
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
        if self._step == "watch":
            return [Decision("look", "nothing is heard of it")] if self._silence.by_cpu else self._silent(now)
        if self._step == "fault":
            return self._term(now, "did not end after its fault")
        if self._step == "drain":
            return self._term(now, "requests were still in flight at the end of the drain")
        if self._step == "term":
            return self._next("kill", now + KILL_WAIT_S, Decision("kill", "did not end after SIGTERM"))
        if self._server == "leftover":
            return self.emptied(now, self.last_error or "asked to stop")
        return self._finish("failed", "the server does not end, not even after SIGKILL")

    def _watch(self) -> list[Decision]:
        return self._next("watch", self._silence.due)

    def _heard(self, now: float) -> list[Decision]:
        self._silence.heard(now)
        return self._watch() if self._step == "watch" else []

    def _silent(self, now: float) -> list[Decision]:
        """Nothing was heard of the server for too long."""
        limit = f"{self._silence.limit_s:g} s"
        if self._ready_at is None:
            why = f"the server showed no progress for {limit} (hangTimeout)"
            if self._unproved:
                why += f": {self._unproved}"
            if self.trial or self._unproved:
                self._verdict = why
        elif self._outside:
            why = f"the server hung: no answer for {limit}, and its processes did nothing (hangTimeout)"
        else:
            why = f"the server froze: no sign of life for {limit}, and its processes did nothing (freezeTimeout)"
            wait_s = min(FROZEN_TERM_S, self._rules.stop_timeout_s)
            return self._replace("freeze", why, self._next("term", now + wait_s, Decision("term_asleep", why)))
        return self._replace("hang", why, self._term(now, why))

    def _replace(self, cause: Cause, why: str, decisions: list[Decision]) -> list[Decision]:
        """Another server takes the place of this one, whose end counts as a crash with this reason."""
        self.ending = self.last_error = why
        self.state, self.cause = "restarting", cause
        return decisions

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
        self._rules, self.trial, self.on_fallback = self._next_rules, "starting", self._next_on_fallback
        return self._start_anew(now, "asked")

    def _start_anew(self, now: float, cause: Cause, *decisions: Decision) -> list[Decision]:
        """Starts another server: what its predecessor did does not count against it."""
        self.state, self.cause, self._verdict = "restarting", cause, None
        self._budget.forgive()
        return self._next("spawn", now, *decisions)

    def _serves(self, now: float) -> list[Decision]:
        self.state = "degraded" if self.on_fallback else "ready"
        self.last_error = self._reverted = None
        if not self.on_fallback:
            self._rolled_back = None
        self._good_on_fallback = self.on_fallback
        self._silence = Silence(now, self._rules.hang_s if self._outside else self._rules.freeze_s, by_cpu=True)
        self._watch()
        if self.trial is None:
            return []
        self.trial, self._good_rules = None, self._rules
        return [Decision("adopt", "it proved itself")]

    def _give_up(self, now: float, why: str) -> list[Decision]:
        """No further restart of this: back to what was before if it is on trial, else to the fallback, else the end."""
        if self.trial:
            self.trial, self._rules, self.on_fallback = None, self._good_rules, self._good_on_fallback
            self.last_error = self._reverted = why
            return self._start_anew(now, "rollback", Decision("revert", why))
        if self._reverted:
            why = f"{why}. It was started again because its successor failed: {self._reverted}"
            self._reverted = None
        if self._rules.fallback and not self.on_fallback:
            self.on_fallback = True
            self.last_error = self._rolled_back = why
            return self._start_anew(now, "rollback", Decision("rollback", why))
        if self.on_fallback and self._rolled_back:
            why = f"the fallback failed: {why}. It ran because of this: {self._rolled_back}"
        return self._finish("failed", why)

    def _sleep(self, why: str) -> list[Decision]:
        self.state, self.unloading, self._step, self.deadline = "idle", None, None, None
        return [Decision("idle", why)]

    def _next(self, step: Step, at: float | None, *decisions: Decision) -> list[Decision]:
        self._step, self.deadline = step, at
        return list(decisions)

    def _term(self, now: float, why: str) -> list[Decision]:
        return self._next("term", now + self._rules.stop_timeout_s, Decision("term", why))

    def _finish(self, state: State, why: str) -> list[Decision]:
        self.state, self.finished, self.draining = state, True, False
        self.phase = self.deadline = self._step = None
        if state == "failed":
            self.last_error = why
        return [Decision("finish", why)]
