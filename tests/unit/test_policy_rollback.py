"""The rules about the fallback: when it takes over, what it takes to leave it, and what ends with it."""

import pytest
from support.policies import RULES, crash, dos, policy_at_work, until_due

from mlx_launcher.supervisor.policy import Policy

WITH_FALLBACK = RULES._replace(fallback=True)


def next_server(policy: Policy, now: float) -> None:
    assert dos(policy.tick(max(now, until_due(policy)))) == ["spawn"]
    policy.spawned(now)


def rolled_back() -> Policy:
    """A policy whose configured backend reported a fault, and whose fallback serves."""
    policy = policy_at_work(WITH_FALLBACK)
    policy.fault(1.0, "torn weights")
    assert dos(policy.exited(1.1, "exit 1", left=False)) == ["rollback"]
    assert (policy.state, policy.on_fallback, policy.last_error) == ("restarting", True, "torn weights")
    next_server(policy, 1.1)
    assert policy.ready(2.0) == []
    return policy


def test_a_fault_before_ready_goes_to_the_fallback_which_is_degraded() -> None:
    policy = rolled_back()
    assert (policy.state, policy.on_fallback, policy.last_error) == ("degraded", True, None)


def test_a_crash_loop_goes_to_the_fallback_at_once_with_a_budget_of_its_own() -> None:
    policy = policy_at_work(WITH_FALLBACK)
    policy.ready(0.0)
    assert [crash(policy, 1.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    decisions = policy.exited(1.0, "died", left=False)
    assert [(d.do, d.why) for d in decisions] == [("rollback", "4 crashes within 300 s of service, the last one: died")]
    assert until_due(policy) == 1.0
    next_server(policy, 1.0)
    assert [crash(policy, 2.0) for _ in range(4)] == [0.0, 0.5, 1.0, -1.0]
    assert (policy.state, policy.finished) == ("failed", True)
    assert (policy.last_error or "").startswith("the fallback failed: 4 crashes")
    assert "It ran because of this: 4 crashes" in (policy.last_error or "")


def test_what_cannot_be_started_at_all_goes_to_the_fallback() -> None:
    policy = Policy(WITH_FALLBACK, lambda: 0.0)
    policy.begin(0.0)
    policy.tick(0.0)
    assert dos(policy.spawn_failed(0.0, "no such file", permanent=True)) == ["rollback"]


def test_the_fallback_fails_too() -> None:
    policy = policy_at_work(WITH_FALLBACK)
    policy.fault(1.0, "torn weights")
    policy.exited(1.1, "exit 1", left=False)
    next_server(policy, 1.1)
    policy.fault(2.0, "no mlx")
    assert dos(policy.exited(2.1, "exit 1", left=False)) == ["finish"]
    assert policy.last_error == "the fallback failed: no mlx. It ran because of this: torn weights"


def test_a_crash_of_the_fallback_is_answered_with_the_fallback() -> None:
    policy = rolled_back()
    assert crash(policy, 3.0) == 0.0
    policy.ready(4.0)
    assert policy.state == "degraded"


@pytest.mark.parametrize("proves", [True, False])
def test_another_plan_leaves_the_fallback_only_if_it_proves_itself(proves: bool) -> None:
    policy = rolled_back()
    assert dos(policy.switch(3.0, 10.0, WITH_FALLBACK)) == ["drain"]
    assert (policy.on_fallback, policy.drains) == (True, True)  # as long as it runs
    policy.exited(4.0, "exit 0", left=False)
    next_server(policy, 4.0)
    assert policy.on_fallback is False
    if proves:
        assert dos(policy.ready(5.0)) == ["adopt"]
        assert policy.state == "ready"
        return
    policy.fault(5.0, "still torn")
    assert dos(policy.exited(5.0, "exit 1", left=False)) == ["revert"]
    next_server(policy, 5.0)
    policy.ready(6.0)
    assert (policy.state, policy.on_fallback) == ("degraded", True)


def test_a_switch_to_the_fallback_and_back() -> None:
    policy = policy_at_work(WITH_FALLBACK)
    policy.ready(0.0)
    for now, to_fallback, state in ((1.0, True, "degraded"), (5.0, False, "ready")):
        assert dos(policy.switch(now, 10.0, WITH_FALLBACK, to_fallback)) == ["drain"]
        assert policy.exited(now + 1, "exit 0", left=False) == []
        next_server(policy, now + 1)
        assert dos(policy.ready(now + 2)) == ["adopt"]
        assert (policy.state, policy.on_fallback) == (state, to_fallback)


def test_a_fallback_on_trial_that_does_not_prove_itself_brings_the_configured_backend_back() -> None:
    policy = policy_at_work(WITH_FALLBACK)
    policy.ready(0.0)
    policy.switch(1.0, 0.0, WITH_FALLBACK, True)
    policy.exited(1.5, "SIGTERM", left=False)
    next_server(policy, 1.5)
    assert policy.on_fallback is True
    policy.fault(2.0, "no mlx")
    assert dos(policy.exited(2.0, "exit 1", left=False)) == ["revert"]
    next_server(policy, 2.0)
    policy.ready(3.0)
    assert (policy.state, policy.on_fallback) == ("ready", False)


def test_a_configured_backend_that_failed_after_a_failed_switch_has_its_fallback_still() -> None:
    policy = policy_at_work(WITH_FALLBACK)
    policy.ready(0.0)
    policy.switch(1.0, 0.0, WITH_FALLBACK)
    policy.exited(1.5, "SIGTERM", left=False)
    next_server(policy, 1.5)
    policy.fault(2.0, "new one broken")
    assert dos(policy.exited(2.0, "exit 1", left=False)) == ["revert"]
    next_server(policy, 2.0)
    policy.fault(3.0, "old one broken")
    decisions = policy.exited(3.0, "exit 1", left=False)
    assert dos(decisions) == ["rollback"]
    assert "old one broken" in decisions[0].why
    assert "new one broken" in decisions[0].why
