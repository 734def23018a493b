"""Which plan is in force, what takes its place, and how that went."""

import selectors
from collections.abc import Callable
from typing import Any

from mlx_launcher.plan import Plan
from mlx_launcher.supervisor import plans, status
from mlx_launcher.supervisor.journal import Journal, RotatingFile, utc_now
from mlx_launcher.supervisor.policy import Decision
from mlx_launcher.supervisor.reload import Refusal, Reload, misplaced
from mlx_launcher.supervisor.terminal import Terminal

# How often the log says that the fallback runs.
REMIND_S = 3600.0


class Changes:
    """`plan` is in force, `log` takes its server's output. `rollback` says why its fallback runs, where that is so.

    A change begins with `reload` or `switch` and gets its outcome by `end`; there is one at a time.
    """

    def __init__(self, plan: Plan, journal: Journal, terminal: Terminal) -> None:
        self.plan = plan
        self.again = False  # somebody asked for a reload while one was under way
        self.rollback: dict[str, Any] | None = None
        self.log = RotatingFile(plan["log_file"], plan["log_max_bytes"])
        self._good = plan
        self._next: Plan | None = None  # takes its place when the server has ended
        self._remind_at: float | None = None
        self._reload: Reload | None = None
        self._journal, self._terminal = journal, terminal

    @property
    def under_way(self) -> bool:
        return self._reload is not None and self._reload.under_way

    @property
    def seen(self) -> dict[str, Any] | None:
        """What `status` shows of the last change."""
        return self._reload.seen if self._reload else None

    def reload(self, trigger: str, selector: selectors.BaseSelector) -> int:
        """Has the command make a plan; `poll` gives it. The number of the change."""
        self.again = False
        self._terminal.say("planning")
        self._terminal.notify.reloading()
        reload = Reload(self._number(trigger), trigger, self.write)
        self._reload = reload
        reload.plan(self.plan["source"], selector)
        return int(reload.seen["id"])

    def switch(self, to_fallback: bool, reason: str, automatic: bool) -> int:
        """The same plan on its other backend, which the policy has to be told. The number of the change."""
        self._reload = Reload(self._number("rollback"), "rollback", self.write)
        if to_fallback:
            self.rolled_back(reason, automatic)
        return int(self._reload.seen["id"])

    def rolled_back(self, reason: str, automatic: bool) -> None:
        """Remembers why the fallback runs."""
        names = plans.names(self.plan)
        self.rollback = {"from": names[0], "to": names[1], "at": utc_now(), "reason": reason, "automatic": automatic}

    def poll(self) -> Plan | None:
        """The plan to switch to, once, when there is one; what is none is refused here."""
        if self._reload is None or (outcome := self._reload.poll()) is None:
            return None
        self._terminal.notify.ready()  # as far as a manager is concerned, who waits for it
        if not isinstance(outcome, Refusal):
            outcome = misplaced(self.plan, outcome) or outcome
        if isinstance(outcome, Refusal):
            self.end("refused", outcome)
            return None
        seen = self._reload.seen
        seen["changes"] = plans.changes(self.plan, outcome)
        for change in seen["changes"]:
            self._journal.note("plan_change", change=change)
        if seen["trigger"] == "SIGHUP" and plans.same_server(self.plan, outcome):
            self.end("done")
            return None
        seen["state"] = "switching"
        self._next = outcome
        return outcome

    def decided(self, decision: Decision) -> None:
        """Takes up what the policy decided about what was on trial, or about the fallback."""
        if decision.do == "adopt":
            self._good = self.plan
            self.end("done")
        elif decision.do == "revert":
            self._next = self._good
            hint = "The last configuration that worked is in force again"
            self.end("reverted", Refusal(decision.why, hint))
        elif decision.do == "rollback":
            self.rolled_back(decision.why, automatic=True)

    def remind(self, now: float, degraded: bool, seen: Callable[[], dict[str, Any]]) -> None:
        """To be called now and then: a fallback that works is easily forgotten. `seen` is called for the status."""
        if not degraded:
            self._remind_at = None
        elif self._remind_at is None:
            self._remind_at = now + REMIND_S
        elif now >= self._remind_at:
            self._remind_at = now + REMIND_S
            text = status.degraded(seen())
            self._journal.note("degraded", reason=text)
            self.write(f"mlx-launch: degraded, {text}\n".encode("utf-8", "replace"))

    def write(self, data: bytes) -> None:
        """To the log of the plan in force."""
        self.log.write(data)

    def end(self, state: str, refusal: Refusal | None = None) -> None:
        """`done`, `refused` or `reverted`, the last two with the reason."""
        if self._reload is not None and self.under_way:
            self._reload.ended(state, refusal)
            reason = refusal.reason if refusal else None
            what = "rollback" if self._reload.seen["trigger"] == "rollback" else "restart"
            self._journal.note(f"reload_{state}", reason=reason)
            self._terminal.say(f"{what} {state}: {reason}" if reason else f"{what} {state}")

    def stopped(self) -> None:
        """Nothing changes any more."""
        self._terminal.notify.stopping()
        self.again = False
        if self._reload is not None and self.under_way:
            self._reload.abandon()
            self._reload.ended("refused", Refusal("the server was asked to stop", ""))

    def close(self) -> None:
        if self._reload is not None:
            self._reload.abandon()
        self.log.close()

    def take(self) -> None:
        """The old server has ended: what was planned is in force."""
        if self._next is not None:
            self.plan, self._next = self._next, None
            self.log.close()
            self.log = RotatingFile(self.plan["log_file"], self.plan["log_max_bytes"])
            self.note_warnings()

    def _number(self, trigger: str) -> int:
        number = self._reload.seen["id"] + 1 if self._reload else 1
        self._journal.note("reload", id=number, trigger=trigger)
        return number

    def note_warnings(self) -> None:
        """Notes what is worth saying once of the plan in force."""
        for text in plans.notes(self.plan):
            self._journal.note("warning", text=text)
