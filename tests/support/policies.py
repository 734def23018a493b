"""A policy at work, and the events that most tests of it begin with."""

from mlx_launcher.supervisor.policy import Decision, Policy
from mlx_launcher.supervisor.rules import Rules

RULES = Rules(
    max_restarts=3,
    window_s=300.0,
    backoff_s=0.5,
    backoff_max_s=30.0,
    stop_timeout_s=30.0,
    hang_s=120.0,
    freeze_s=30.0,
)


def dos(decisions: list[Decision]) -> list[str]:
    return [d.do for d in decisions]


def spawned(policy: Policy, now: float = 0.0) -> None:
    assert dos(policy.begin(now) + policy.tick(now)) == ["spawn"]
    policy.spawned(0.0)


def until_due(policy: Policy) -> float:
    assert policy.deadline is not None
    return policy.deadline


def crash(policy: Policy, now: float) -> float:
    """One crash, and the next start when it is due; the delay."""
    decisions = policy.exited(now, "died", left=False)
    if policy.finished:
        assert dos(decisions) == ["finish"]
        return -1.0
    due = until_due(policy)
    assert dos(policy.tick(due)) == ["spawn"]
    policy.spawned(0.0)
    return due - now


def policy_at_work(rules: Rules = RULES, jitter: float = 0.0) -> Policy:
    policy = Policy(rules, lambda: jitter)
    spawned(policy)
    return policy
