"""The rules about restarts and stopping, by example and by invariant."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.policies import RULES, crash, dos, policy_at_work, spawned, until_due

from mlx_launcher.supervisor.policy import (
    FAULT_EXIT_S,
    KILL_WAIT_S,
    LEFTOVER_S,
    Decision,
    Policy,
)
from mlx_launcher.supervisor.rules import JITTER, Rules


def test_is_ready_only_after_ready() -> None:
    policy = policy_at_work()
    seen = []
    for phase in ("importing", "loading", "proving"):
        policy.progressed(0.0, phase)
        seen.append((policy.state, policy.phase))
    policy.ready(1.0)
    seen.append((policy.state, policy.phase))
    assert seen == [("starting", "importing"), ("starting", "loading"), ("starting", "proving"), ("ready", None)]


def test_the_first_crash_is_answered_at_once_and_the_next_ones_slower() -> None:
    policy = policy_at_work(RULES._replace(max_restarts=9))
    assert [crash(policy, 0.0) for _ in range(9)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_jitter_lengthens_by_at_most_a_tenth() -> None:
    policy = policy_at_work(jitter=1.0)
    assert [crash(policy, 0.0) for _ in range(3)] == pytest.approx([0.0, 0.55, 1.1])


def test_one_crash_more_than_the_budget_is_a_crash_loop() -> None:
    policy = policy_at_work()
    for _ in range(3):
        crash(policy, 1.0)
    assert crash(policy, 1.0) == -1.0
    assert (policy.state, policy.finished) == ("failed", True)
    assert policy.last_error == "4 crashes within 300 s of service, the last one: died"


def test_a_stable_window_of_service_is_forgiven() -> None:
    policy = policy_at_work()
    now = 0.0
    for _ in range(20):
        policy.ready(now)
        now += RULES.window_s
        assert crash(policy, now) == 0.0


def test_slow_starts_that_never_serve_are_not_forgiven() -> None:
    policy = policy_at_work()
    delays = [crash(policy, 1000.0 * n) for n in range(4)]
    assert delays == [0.0, 0.5, 1.0, -1.0]


def test_restarting_is_shown_until_ready_again() -> None:
    policy = policy_at_work()
    policy.ready(1.0)
    crash(policy, 2.0)
    assert (policy.state, policy.phase, policy.last_error, policy.restarts) == ("restarting", "importing", "died", 1)
    policy.ready(3.0)
    assert (policy.state, policy.last_error) == ("ready", None)


def test_a_fault_before_ready_is_final() -> None:
    policy = policy_at_work()
    policy.fault(1.0, "torn weights")
    assert dos(policy.exited(1.1, "exit 1", left=False)) == ["finish"]
    assert (policy.state, policy.last_error) == ("failed", "torn weights")


@pytest.mark.parametrize(("frozen", "cause"), [(True, "freeze"), (False, "crash")])
def test_a_server_says_why_it_ends(frozen: bool, cause: str) -> None:
    policy = policy_at_work()
    policy.ready(1.0)
    policy.dying("rank 1 froze", frozen)
    policy.exited(2.0, "rank 1 froze", left=False)
    assert (policy.cause, policy.last_error) == (cause, "rank 1 froze")
    policy.tick(2.0)
    policy.spawned(2.0)
    assert policy.cause == "crash"


def test_a_fault_after_ready_is_a_crash() -> None:
    policy = policy_at_work()
    policy.ready(1.0)
    policy.fault(2.0, "out of memory")
    assert crash(policy, 2.0) == 0.0


def test_a_host_that_stays_after_its_fault_is_ended() -> None:
    policy = policy_at_work()
    policy.fault(1.0, "torn weights")
    assert dos(policy.tick(1.0 + FAULT_EXIT_S)) == ["term"]
    assert dos(policy.tick(until_due(policy))) == ["kill"]
    assert dos(policy.exited(until_due(policy) - 1, "SIGKILL", left=False)) == ["finish"]
    assert policy.last_error == "torn weights"


def test_the_stop_ladder() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    steps = [(dos(policy.stop(1.0, 10.0)), 1.0)]
    while not policy.finished:
        now = until_due(policy)
        assert not policy.tick(now - 0.001)
        steps.append((dos(policy.tick(now)), now))
    assert steps == [(["drain"], 1.0), (["term"], 11.0), (["kill"], 41.0), (["finish"], 41.0 + KILL_WAIT_S)]
    assert policy.state == "failed"  # not even SIGKILL helped: that is not an orderly end


def test_an_exit_while_stopping_is_expected() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    policy.stop(1.0, 10.0)
    assert dos(policy.exited(2.0, "SIGTERM", left=False)) == ["finish"]
    assert (policy.state, policy.last_error) == ("stopped", None)


def test_a_second_stop_only_shortens_the_drain() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    policy.stop(1.0, 10.0)
    assert policy.stop(2.0, 100.0) == []
    assert until_due(policy) == 11.0
    assert dos(policy.stop(3.0, 0.0)) == ["term"]
    assert policy.stop(4.0, 0.0) == []


@pytest.mark.parametrize("when", ["before the first server", "waiting for the next"])
def test_stop_without_a_server_ends_at_once(when: str) -> None:
    policy = Policy(RULES, lambda: 0.0)
    if when == "before the first server":
        policy.begin(0.0)
    else:
        spawned(policy)
        policy.exited(0.0, "died", left=False)
    assert dos(policy.stop(1.0, 10.0)) == ["finish"]
    assert policy.state == "stopped"


def test_nothing_is_started_while_something_of_the_group_is_left() -> None:
    policy = policy_at_work()
    assert dos(policy.exited(1.0, "died", left=True)) == ["term"]
    assert dos(policy.tick(1.0 + LEFTOVER_S)) == ["kill"]
    assert dos(policy.emptied(4.0, "died")) == ["wait"]
    assert dos(policy.tick(4.0)) == ["spawn"]


def test_what_cannot_be_started_at_all_is_not_tried_again() -> None:
    policy = Policy(RULES, lambda: 0.0)
    policy.begin(0.0)
    policy.tick(0.0)
    assert dos(policy.spawn_failed(0.0, "no such file", permanent=True)) == ["finish"]
    assert (policy.state, policy.last_error) == ("failed", "no such file")


def test_a_fork_that_fails_is_tried_again() -> None:
    policy = Policy(RULES, lambda: 0.0)
    policy.begin(0.0)
    policy.tick(0.0)
    assert dos(policy.spawn_failed(0.0, "no memory", permanent=False)) == ["wait"]
    assert dos(policy.tick(0.0)) == ["spawn"]


class AnyOrder(RuleBasedStateMachine):
    """Events in every order that a real server can produce, at any times."""

    def __init__(self) -> None:
        super().__init__()
        self.rules_ = Rules(3, 20.0, 0.5, 4.0, 3.0, 10.0, 5.0, 1000, fallback=True, idle_s=7.0)
        self.policy = Policy(self.rules_, lambda: self.jitter)
        self.jitter = 0.0
        self.now = 0.0
        self.alive = False
        self.outside = False
        self.proved = False  # the server that is alive
        self.ready_at = 0.0
        self.left = False  # others of the group
        self.killed = False
        self.cpu_s = 0.0
        self.counter = 0
        self.spawns: list[float] = []
        self.stop_asked: float | None = None
        self.trials = self.outcomes = 0
        self.on_trial = False
        self.woken = False

    @initialize(idle=st.booleans())
    def begins(self, idle: bool) -> None:
        self.take(self.policy.begin(self.now, idle))
        assert self.policy.asleep is idle

    def take(self, decisions: list[Decision]) -> None:
        for do, why in decisions:
            assert not (self.policy.finished and do != "finish")
            assert why, "something is done without a reason"
            if do == "look":
                self.take(self.policy.looked(self.now, self.cpu_s))
            if do == "spawn":
                assert not self.alive, "two servers"
                assert not self.left or self.killed, "a server beside the rest of the last one"
                assert self.stop_asked is None, "a start after a stop"
                self.alive, self.left, self.killed = True, False, False
                self.proved = False
                if self.policy.trial and not self.on_trial:
                    self.spawns.clear()
                self.on_trial = bool(self.policy.trial)
                if not self.woken:
                    self.spawns.append(self.now)
                self.woken = False
                self.policy.spawned(self.now, self.outside)
            if do in ("adopt", "revert"):
                self.outcomes += 1
            if do in ("revert", "rollback"):
                self.spawns.clear()  # another plan, another backend has a budget of its own
            if do == "idle":
                assert not self.alive, "idle with a server"
                assert not self.left or self.killed
            self.woken |= do == "wake"  # what is started because somebody asks is no answer to a crash
            # What outlives a SIGKILL after its leader is at last given up: zombies that nobody reaps.
            self.killed |= do == "kill"

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 1.0, 5.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.policy.tick(self.now))

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.1, 5.0]))
    def works(self, seconds: float) -> None:
        self.cpu_s += seconds

    @rule(outside=st.booleans())
    def the_next_server_has_a_channel(self, outside: bool) -> None:
        self.outside = outside

    @precondition(lambda self: self.alive)
    @rule(
        in_flight=st.integers(0, 2),
        queued=st.integers(0, 1),
        idle_s=st.sampled_from([None, 0.0, 6.9, 7.0, 1e6]),
        moved=st.booleans(),
        rss=st.sampled_from([10, 999, 1001]),
    )
    def beats(self, in_flight: int, queued: int, idle_s: float | None, moved: bool, rss: int) -> None:
        self.counter += moved
        busy = in_flight + queued > 0
        beat = {"in_flight": in_flight, "queued": queued, "processed_tokens": self.counter, "rss_bytes": rss}
        serving, unloading = self.policy.state in ("ready", "degraded"), self.policy.unloading
        decisions = self.policy.beat(self.now, {**beat, "idle_s": idle_s})
        self.take(decisions)
        if self.policy.unloading and not unloading:
            assert serving
            assert not busy, "unloaded with work in flight"
            assert idle_s is not None
            assert idle_s >= self.rules_.idle_s
            assert dos(decisions) == ["drain"]
            return
        if unloading and busy and moved and self.policy._step == "drain":
            assert until_due(self.policy) == self.now + self.rules_.stop_timeout_s, "who came in between is cut off"
        if moved and rss <= 1000:
            assert not decisions, "a server that gets on was ended"
        if decisions:
            assert serving
            assert self.policy.ending == self.policy.last_error
            assert self.policy.state == "restarting"

    @precondition(lambda self: self.alive)
    @rule(answers=st.booleans())
    def is_asked(self, answers: bool) -> None:
        self.take(self.policy.answered(self.now) if answers else self.policy.refused(self.now))

    @rule(jitter=st.floats(0, 1))
    def chance(self, jitter: float) -> None:
        self.jitter = jitter

    @precondition(lambda self: self.alive)
    @rule(kind=st.sampled_from(["loading", "ready", "fault"]))
    def message(self, kind: str) -> None:
        if kind == "ready":
            if not self.proved:
                self.proved, self.ready_at = True, self.now
            self.take(self.policy.ready(self.now))
        elif kind == "fault":
            self.take(self.policy.fault(self.now, "fault"))
        else:
            self.take(self.policy.progressed(self.now, kind))

    @precondition(lambda self: self.alive)
    @rule(left=st.booleans())
    def exits(self, left: bool) -> None:
        self.alive, self.left = False, left
        serving, unloading = self.policy.state in ("ready", "degraded"), self.policy.unloading
        before = self.policy.restarts, self.policy.last_error
        decisions = self.policy.exited(self.now, "died", left)
        self.check_delay(decisions)
        if unloading:
            assert self.policy.state == "idle"
            assert (self.policy.restarts, self.policy.last_error) == before, "an end in good order counts as a crash"
        elif serving and not left and self.stop_asked is None and self.now - self.ready_at >= self.rules_.window_s:
            assert "wait" in dos(decisions), "what was long ago counted"
            assert until_due(self.policy) == self.now

    @precondition(lambda self: self.left)
    @rule()
    def group_ends(self) -> None:
        self.left = False
        self.check_delay(self.policy.emptied(self.now, "died"))

    def check_delay(self, decisions: list[Decision]) -> None:
        self.take(decisions)
        if "wait" in dos(decisions):
            assert until_due(self.policy) - self.now <= self.rules_.backoff_max_s * (1 + JITTER)

    @rule()
    def somebody_connects(self) -> None:
        asleep, on_fallback = self.policy.asleep, self.policy.on_fallback
        decisions = self.policy.wanted(self.now)
        self.take(decisions)
        assert dos(decisions) == (["wake"] if asleep else [])
        if asleep:
            assert (self.policy.state, until_due(self.policy)) == ("starting", self.now)
            assert self.policy.on_fallback is on_fallback
            self.take(self.policy.tick(self.now))
            assert self.alive

    @rule(drain_s=st.sampled_from([0.0, 1.0, 10.0]), to_fallback=st.booleans())
    def switch(self, drain_s: float, to_fallback: bool) -> None:
        if not (self.policy.finished or self.policy.trial or self.policy.draining):
            self.trials += 1
            self.take(self.policy.switch(self.now, drain_s, self.rules_, to_fallback))
            assert self.policy.trial

    @rule(drain_s=st.sampled_from([0.0, 1.0, 10.0]))
    def stop(self, drain_s: float) -> None:
        if not self.policy.finished:
            if self.stop_asked is None:
                self.stop_asked = self.now
            self.take(self.policy.stop(self.now, drain_s))

    @invariant()
    def a_server_is_only_ready_while_it_lives(self) -> None:
        if not self.policy.finished:
            serves = self.policy.state in ("ready", "degraded")
            assert not serves or (self.alive and self.proved)
            assert not serves or (self.policy.state == "degraded") is self.policy.on_fallback

    @invariant()
    def what_failed_has_a_reason(self) -> None:
        assert self.policy.state not in ("failed", "restarting") or self.policy.last_error or self.on_trial_or_switched

    @invariant()
    def restarts_stay_within_the_budget(self) -> None:
        window = [at for at in self.spawns if at > self.now - self.rules_.window_s]
        assert len(window) <= self.rules_.max_restarts + 1

    @invariant()
    def each_trial_has_one_outcome(self) -> None:
        under_way = self.policy.trial is not None or self.stop_asked is not None or self.policy.finished
        assert self.trials - self.outcomes == 0 or (under_way and self.trials - self.outcomes == 1)

    @invariant()
    def something_is_always_due_or_alive(self) -> None:
        assert self.policy.finished or self.policy.deadline is not None or self.alive or self.policy.asleep

    @invariant()
    def what_is_idle_can_be_woken(self) -> None:
        if self.policy.state == "idle" and not self.policy.finished:
            assert not self.alive
            assert self.policy.asleep or self.policy.deadline is not None, "no way back"

    @invariant()
    def a_standby_waits_only_beside_a_server_or_for_one(self) -> None:
        if self.policy.spare == "wanted":
            assert self.alive
            assert self.proved
        if self.policy.asleep or self.policy.finished or self.policy.draining or self.policy.unloading:
            assert self.policy.spare == "unwanted"

    @property
    def on_trial_or_switched(self) -> bool:
        return self.policy.trial is not None or self.trials > 0

    def teardown(self) -> None:
        """Whatever happened, a stop ends, within a time that can be told beforehand, even if no process ever reacts."""
        if not self.policy.finished:
            began = self.now
            self.stop(10.0)
            for _ in range(10):
                if self.policy.finished:
                    break
                self.now = max(self.now, until_due(self.policy))
                self.take(self.policy.tick(self.now))
            assert self.policy.finished
            assert self.now - began <= 10.0 + self.rules_.stop_timeout_s + KILL_WAIT_S + 1e-6


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
