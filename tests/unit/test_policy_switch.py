"""The rules about a plan that takes the place of another one."""

import pytest
from support.policies import RULES, crash, dos, policy_at_work, until_due

from mlx_launcher.supervisor.policy import Policy
from mlx_launcher.supervisor.rules import Rules


def on_trial(rules: Rules = RULES) -> Policy:
    """A policy whose first plan was ready, and whose second one has just been started."""
    policy = policy_at_work()
    policy.ready(0.0)
    assert dos(policy.switch(1.0, 10.0, rules)) == ["drain"]
    assert policy.trial == "ending"
    assert policy.exited(2.0, "SIGTERM", left=False) == []
    assert dos(policy.tick(2.0)) == ["spawn"]
    policy.spawned(2.0)
    return policy


def test_a_switch_drains_and_starts_the_next_plan_without_calling_it_a_crash() -> None:
    policy = on_trial()
    assert (policy.state, policy.trial, policy.restarts, policy.last_error) == ("restarting", "starting", 0, None)
    assert dos(policy.ready(3.0)) == ["adopt"]
    assert (policy.state, policy.trial) == ("ready", None)


def test_a_switch_has_the_ladder_of_a_stop() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    steps = [dos(policy.switch(1.0, 10.0, RULES))]
    for _ in range(3):
        steps.append(dos(policy.tick(until_due(policy))))
    assert steps == [["drain"], ["term"], ["kill"], ["finish"]]


@pytest.mark.parametrize("when", ["waiting", "starting", "after its fault"])
def test_a_switch_at_any_time(when: str) -> None:
    policy = policy_at_work()
    if when == "waiting":
        policy.exited(0.0, "died", left=False)
        assert policy.switch(0.5, 10.0, RULES) == []
    elif when == "starting":
        assert dos(policy.switch(0.5, 10.0, RULES)) == ["term"]
        policy.exited(0.6, "SIGTERM", left=False)
    else:
        policy.fault(0.0, "torn weights")
        assert policy.switch(0.5, 10.0, RULES) == []
        policy.exited(0.6, "exit 1", left=False)
    assert dos(policy.tick(0.6)) == ["spawn"]
    policy.spawned(0.6)
    assert dos(policy.ready(1.0)) == ["adopt"]


def test_a_fault_on_trial_brings_back_the_plan_before() -> None:
    policy = on_trial()
    policy.fault(3.0, "torn weights")
    assert dos(policy.exited(3.1, "exit 1", left=False)) == ["revert"]
    assert (policy.state, policy.last_error) == ("restarting", "torn weights")
    assert dos(policy.tick(3.1)) == ["spawn"]
    policy.spawned(3.1)
    assert policy.ready(4.0) == []  # it was known to be good already
    assert (policy.state, policy.last_error) == ("ready", None)


def test_a_crash_loop_on_trial_brings_back_the_plan_before_with_its_rules() -> None:
    policy = on_trial(RULES._replace(max_restarts=1))
    assert crash(policy, 3.0) == 0.0
    assert dos(policy.exited(3.0, "died", left=False)) == ["revert"]
    assert policy.last_error == "2 crashes within 300 s of service, the last one: died"
    policy.tick(3.0)
    policy.spawned(3.0)
    assert [crash(policy, 4.0) for _ in range(4)] == [0.0, 0.5, 1.0, -1.0]
    assert (policy.state, policy.finished) == ("failed", True)
    assert "started again because its successor failed: 2 crashes" in (policy.last_error or "")


def test_silence_on_trial_is_bounded_and_progress_moves_the_bound() -> None:
    policy = on_trial(RULES._replace(hang_s=5.0))
    policy.progressed(2.0, "loading", 0)
    assert until_due(policy) == 7.0
    policy.progressed(6.0, "loading", 1)
    policy.progressed(8.0, "loading", 1)  # no byte more
    assert until_due(policy) == 11.0
    assert dos(policy.tick(11.0)) == ["term"]
    assert policy.ready(11.5) == []
    assert dos(policy.exited(12.0, "SIGTERM", left=False)) == ["revert"]
    assert policy.last_error == "the server showed no progress for 5 s (hangTimeout)"


def test_silence_has_no_bound_where_there_is_none() -> None:
    assert on_trial(RULES._replace(hang_s=0.0)).deadline is None


def test_one_switch_at_a_time() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    policy.switch(1.0, 10.0, RULES)
    due = policy.deadline
    assert policy.switch(2.0, 99.0, RULES) == []
    assert policy.deadline == due


def test_a_stop_during_a_switch_is_a_stop() -> None:
    policy = policy_at_work()
    policy.ready(0.0)
    policy.switch(1.0, 10.0, RULES)
    assert policy.stop(2.0, 5.0) == []
    assert until_due(policy) == 7.0
    assert dos(policy.exited(3.0, "exit 0", left=False)) == ["finish"]
    assert policy.state == "stopped"
    trial = on_trial()
    assert dos(trial.stop(3.0, 10.0)) == ["term"]
    assert dos(trial.exited(3.5, "SIGTERM", left=False)) == ["finish"]


def test_what_proved_itself_is_what_the_next_trial_goes_back_to() -> None:
    policy = on_trial(RULES._replace(max_restarts=1))
    policy.ready(3.0)
    policy.switch(4.0, 0.0, RULES)
    policy.exited(4.5, "SIGTERM", left=False)
    policy.tick(4.5)
    policy.spawned(4.5)
    policy.fault(5.0, "torn weights")
    assert dos(policy.exited(5.0, "exit 1", left=False)) == ["revert"]
    policy.tick(5.0)
    policy.spawned(5.0)
    assert [crash(policy, 6.0) for _ in range(2)] == [0.0, -1.0]  # by the rules of the second plan
