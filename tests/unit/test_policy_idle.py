"""The rules about what nobody uses: when it is unloaded, what is no reason to, and how it comes back."""

from typing import Any

import pytest
from support.policies import RULES, crash, dos, policy_at_work, until_due

from mlx_launcher.supervisor.policy import LEFTOVER_S, Policy

IDLE = RULES._replace(idle_s=600.0, fallback=True)
UNUSED = {"in_flight": 0, "queued": 0, "idle_s": 600.0}


def served(**rules: Any) -> Policy:
    policy = policy_at_work(IDLE._replace(**rules))
    policy.ready(0.0)
    return policy


def slept(**rules: Any) -> Policy:
    """A policy whose server was unloaded at 600 s."""
    policy = served(**rules)
    assert dos(policy.beat(600.0, UNUSED)) == ["drain"]
    assert dos(policy.exited(600.0, "exit 0", left=False)) == ["idle"]
    return policy


def woken(policy: Policy, now: float) -> None:
    assert dos(policy.wanted(now)) == ["wake"]
    assert dos(policy.tick(now)) == ["spawn"]
    policy.spawned(now)


def test_what_is_not_used_is_drained_then_nothing_is_due() -> None:
    policy = served()
    assert dos(policy.beat(600.0, UNUSED)) == ["drain"]
    assert (policy.state, policy.drains, policy.unloading) == ("ready", False, "no work for 600 s (idleTimeout)")
    assert dos(policy.exited(601.0, "exit 0", left=False)) == ["idle"]
    assert (policy.state, policy.asleep, policy.deadline, policy.last_error) == ("idle", True, None, None)
    assert policy.tick(1e9) == []


@pytest.mark.parametrize(
    ("beat", "rules", "now"),
    [
        ({"in_flight": 1}, {}, 600.0),
        ({"queued": 1}, {}, 600.0),
        ({"idle_s": 599.9}, {}, 600.0),
        ({"idle_s": None}, {}, 600.0),
        ({"idle_s": "long"}, {}, 600.0),
        ({}, {"idle_s": 0.0}, 600.0),
        ({}, {}, 599.9),  # what a host counts from before it was ready is not idleness
    ],
)
def test_what_is_no_reason(beat: dict[str, Any], rules: dict[str, Any], now: float) -> None:
    policy = served(**rules)
    assert policy.beat(now, {**UNUSED, **beat}) == []
    assert policy.unloading is None


def test_who_comes_in_between_is_finished_as_long_as_it_gets_on() -> None:
    policy = served()
    policy.beat(600.0, UNUSED)
    for n in range(1, 100):
        assert policy.beat(600.0 + 20 * n, {"in_flight": 1, "processed_tokens": n}) == []
        assert policy.tick(600.0 + 20 * n + 19) == []
    assert dos(policy.tick(600.0 + 20 * 99 + RULES.stop_timeout_s)) == ["term"]
    assert dos(policy.exited(9999.0, "SIGTERM", left=False)) == ["idle"]


def test_what_is_left_of_the_group_goes_first() -> None:
    policy = served()
    policy.beat(600.0, UNUSED)
    assert dos(policy.exited(600.0, "exit 0", left=True)) == ["term"]
    assert (policy.state, policy.asleep, policy.wanted(601.0)) == ("idle", False, [])
    assert dos(policy.tick(600.0 + LEFTOVER_S)) == ["kill"]
    assert dos(policy.emptied(603.0, "exit 0")) == ["idle"]
    assert policy.asleep


@pytest.mark.parametrize(("beat", "restarts"), [(UNUSED, 0), ({"in_flight": 1}, 1)])
def test_what_outlives_a_kill_is_answered_once(beat: dict[str, Any], restarts: int) -> None:
    policy = served()
    policy.beat(600.0, beat)
    policy.exited(600.0, "exit 0", left=True)
    assert dos(policy.tick(610.0)) == ["kill"]
    assert dos(policy.tick(630.0)) == (["wait"] if restarts else ["idle"])
    assert policy.emptied(630.1, "exit 0") == []
    assert (policy.restarts, policy.asleep) == (restarts, not restarts)


def test_somebody_connects() -> None:
    policy = slept()
    woken(policy, 1000.0)
    assert (policy.state, policy.phase, policy.wanted(1000.0)) == ("starting", "importing", [])
    policy.ready(1010.0)
    assert (policy.state, policy.restarts) == ("ready", 0)


def test_coming_back_costs_nothing_of_the_budget() -> None:
    policy = slept(max_restarts=1)
    for n in range(1, 50):
        woken(policy, 600.0 * n)
        policy.ready(600.0 * n)
        policy.beat(600.0 * (n + 1), UNUSED)
        assert dos(policy.exited(600.0 * (n + 1), "exit 3", left=False)) == ["idle"]
    woken(policy, 60_000.0)
    assert crash(policy, 60_000.0) == 0.0
    assert policy.restarts == 1


def test_a_server_that_fails_when_it_is_woken_goes_to_the_fallback() -> None:
    policy = slept()
    woken(policy, 1000.0)
    policy.fault(1001.0, "torn weights")
    assert dos(policy.exited(1001.0, "exit 1", left=False)) == ["rollback"]


def test_the_fallback_stays_the_fallback() -> None:
    policy = policy_at_work(IDLE)
    policy.fault(1.0, "torn weights")
    policy.exited(1.0, "exit 1", left=False)
    policy.tick(1.0)
    policy.spawned(1.0)
    policy.ready(2.0)
    policy.beat(700.0, UNUSED)
    policy.exited(700.0, "exit 0", left=False)
    assert (policy.state, policy.on_fallback) == ("idle", True)
    woken(policy, 800.0)
    policy.ready(801.0)
    assert (policy.state, policy.on_fallback) == ("degraded", True)


def test_a_stop_while_idle_or_on_the_way_there() -> None:
    policy = slept()
    assert dos(policy.stop(700.0, 30.0)) == ["finish"]
    policy = served()
    policy.beat(600.0, UNUSED)
    assert policy.stop(601.0, 30.0) == []
    assert dos(policy.exited(602.0, "exit 0", left=False)) == ["finish"]
    assert policy.state == "stopped"


def test_a_switch_while_idle_or_on_the_way_there() -> None:
    policy = slept()
    assert policy.switch(700.0, 30.0, IDLE) == []
    assert (policy.trial, until_due(policy), policy.wanted(700.0)) == ("starting", 700.0, [])
    policy = served()
    policy.beat(600.0, UNUSED)
    assert policy.switch(601.0, 30.0, IDLE) == []
    policy.exited(602.0, "exit 0", left=False)
    assert (policy.state, policy.trial, until_due(policy)) == ("restarting", "starting", 602.0)


def test_to_begin_idle_is_for_those_who_know_idleness() -> None:
    policy = Policy(IDLE, lambda: 0.0)
    assert dos(policy.begin(0.0, idle=True)) == ["idle"]
    woken(policy, 5.0)
    policy = Policy(RULES, lambda: 0.0)
    assert policy.begin(0.0, idle=True) == []
    assert dos(policy.tick(0.0)) == ["spawn"]


def test_when_a_standby_is_wanted() -> None:
    policy = policy_at_work(IDLE)
    seen = [policy.spare]  # the first start has none beside it
    policy.ready(0.0)
    seen.append(policy.spare)
    policy.exited(1.0, "died", left=False)  # it takes over
    seen.append(policy.spare)
    policy.tick(1.0)
    policy.spawned(1.0)
    policy.ready(2.0)
    policy.beat(700.0, UNUSED)
    seen.append(policy.spare)
    policy.exited(700.0, "exit 0", left=False)
    seen.append(policy.spare)
    policy.switch(701.0, 0.0, IDLE)
    seen.append(policy.spare)
    assert seen == ["kept", "wanted", "kept", "unwanted", "unwanted", "unwanted"]
