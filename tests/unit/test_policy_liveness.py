"""The rules that tell a server that is busy from one that hangs."""

from typing import Any

import pytest
from support.policies import RULES, crash, dos, policy_at_work, until_due

from mlx_launcher.supervisor.policy import FROZEN_TERM_S, Policy


def ready(**rules: Any) -> Policy:
    policy = policy_at_work(RULES._replace(**rules))
    policy.ready(0.0)
    return policy


def beat(policy: Policy, now: float, in_flight: int = 1, **counters: int) -> list[str]:
    return dos(policy.beat(now, {"in_flight": in_flight, **counters}))


def test_busy_for_hours_is_never_ended() -> None:
    policy = ready()
    for second in range(20_000):
        assert beat(policy, float(second), processed_tokens=second // 60) == []
        assert policy.tick(float(second)) == []
    assert policy.state == "ready"


def test_work_that_stands_still_is_a_hang() -> None:
    policy = ready()
    assert [beat(policy, float(second)) for second in range(121)] == [[]] * 120 + [["term"]]
    assert policy.ending == "the server hung: requests in flight, and no progress for 120 s (hangTimeout)"
    assert (policy.state, policy.last_error) == ("restarting", policy.ending)
    assert dos(policy.exited(121.0, "SIGTERM", left=False)) == ["wait"]
    assert policy.last_error == "the server hung: requests in flight, and no progress for 120 s (hangTimeout)"
    assert policy.ending is None
    assert policy.restarts == 1


def test_a_hang_has_the_ladder_of_a_stop() -> None:
    policy = ready()
    for second in range(121):
        beat(policy, float(second))
    assert dos(policy.tick(until_due(policy))) == ["kill"]


def test_an_idle_server_is_no_hang_and_new_work_has_its_own_time() -> None:
    policy = ready()
    for second in range(1000):
        assert beat(policy, float(second), in_flight=0) == []
    for second in range(1000, 1120):
        assert beat(policy, float(second)) == []
    assert beat(policy, 1120.0) == ["term"]


def test_what_waits_while_nothing_is_in_flight_is_a_hang_too() -> None:
    policy = ready()
    for second in range(120):
        assert dos(policy.beat(float(second), {"in_flight": 0, "queued": 2})) == []
    assert dos(policy.beat(120.0, {"in_flight": 0, "queued": 2})) == ["term"]


def test_after_a_gap_in_the_hosts_beats_a_hang_is_counted_anew() -> None:
    policy = ready()
    for second in range(100):
        beat(policy, float(second))
    for second in range(120, 240):  # 20 s as in a sleeping laptop, then the same counters
        assert beat(policy, float(second)) == []
    assert beat(policy, 240.0) == ["term"]


def test_a_hang_is_not_looked_for_without_a_timeout() -> None:
    policy = ready(hang_s=0.0)
    assert [beat(policy, float(second)) for second in range(1000)] == [[]] * 1000


def test_no_beats_and_no_work_is_frozen_and_is_not_woken() -> None:
    policy = ready()
    policy.beat(10.0, {})
    assert until_due(policy) == 25.0
    assert dos(policy.tick(25.0)) == ["look"]
    assert policy.looked(25.0, 7.0) == []
    assert dos(policy.tick(40.0)) == ["look"]
    assert dos(policy.looked(40.0, 7.01)) == ["term_asleep"]
    assert policy.last_error == (
        "the server froze: no sign of life for 30 s, and its processes did nothing (freezeTimeout)"
    )
    assert until_due(policy) == 40.0 + FROZEN_TERM_S
    assert dos(policy.tick(until_due(policy))) == ["kill"]


@pytest.mark.parametrize("used", [[1.0, 2.0, 3.0, 4.0], [None] * 4, [1.0, None, 1.0, None]])
def test_no_beats_but_work_is_busy(used: list[float | None]) -> None:
    policy = ready()
    for cpu_s in used * 5:
        now = until_due(policy)
        assert dos(policy.tick(now)) == ["look"]
        assert policy.looked(now, cpu_s) == []
    assert policy.state == "ready"


def test_a_beat_in_the_last_moment_is_in_time() -> None:
    policy = ready()
    policy.looked(15.0, 1.0)
    policy.beat(29.9, {})
    assert policy.looked(30.0, 1.0) == []
    assert until_due(policy) == 29.9 + 15.0


def test_a_look_that_comes_late_gives_the_second_one_its_time() -> None:
    """The loop may have been busy: two measurements in the same moment say nothing."""
    policy = ready()
    assert policy.looked(31.0, 1.0) == []
    assert policy.looked(31.1, 1.0) == []
    assert until_due(policy) == 46.0


def test_frozen_is_not_looked_for_without_a_timeout() -> None:
    assert ready(freeze_s=0.0).deadline is None


def test_a_start_without_progress_is_a_crash_with_its_reason() -> None:
    policy = policy_at_work(RULES._replace(hang_s=5.0))
    policy.progressed(4.0, "loading", 10)
    policy.progressed(8.0, "loading", 20)
    policy.progressed(12.0, "loading", 20)
    assert dos(policy.tick(13.0)) == ["term"]
    assert policy.ready(13.5) == []
    assert dos(policy.exited(14.0, "SIGTERM", left=False)) == ["wait"]
    assert policy.last_error == "the server showed no progress for 5 s (hangTimeout)"


@pytest.mark.parametrize("sign", ["output", "a phase", "counters"])
def test_any_progress_moves_the_deadline_of_a_start(sign: str) -> None:
    policy = policy_at_work(RULES._replace(hang_s=5.0))
    policy.progressed(0.0, "loading")
    if sign == "counters":
        policy.beat(4.0, {"processed_tokens": 1})
    else:
        policy.progressed(4.0, "proving" if sign == "a phase" else None)
    assert until_due(policy) == 9.0
    policy.beat(8.0, {"processed_tokens": 1, "in_flight": 1} if sign == "counters" else {})
    assert until_due(policy) == 9.0  # a beat alone is no progress


@pytest.mark.parametrize("works", [True, False])
def test_an_import_has_no_progress_to_show_and_is_judged_by_its_work(works: bool) -> None:
    policy = policy_at_work(RULES._replace(hang_s=10.0))
    assert dos(policy.tick(5.0)) == ["look"]
    policy.looked(5.0, 1.0)
    assert dos(policy.tick(10.0)) == ["look"]
    assert dos(policy.looked(10.0, 3.0 if works else 1.01)) == ([] if works else ["term"])


def outside(**rules: Any) -> Policy:
    policy = policy_at_work(RULES._replace(**rules))
    policy.exited(0.0, "died", left=False)
    policy.tick(until_due(policy))
    policy.spawned(0.0, outside=True)
    return policy


def test_a_server_without_a_channel_that_works_silently_is_starting() -> None:
    policy = outside()
    for n in range(20):
        now = until_due(policy)
        assert dos(policy.tick(now)) == ["look"]
        assert policy.looked(now, n * 10.0) == []
    assert policy.state == "restarting"


def test_its_wrong_answers_are_no_progress_and_end_without_another_try() -> None:
    policy = outside(hang_s=10.0)
    policy.progressed(1.0, "proving")
    policy.unproved("it answers a chat request with HTTP 500")
    policy.progressed(4.0, "proving")
    policy.progressed(4.0)  # what it writes when it is asked
    assert until_due(policy) == 6.0
    policy.looked(6.0, 1.0)
    assert dos(policy.looked(11.0, 1.01)) == ["term"]
    assert dos(policy.exited(11.5, "SIGTERM", left=False)) == ["finish"]
    assert policy.last_error == (
        "the server showed no progress for 10 s (hangTimeout): it answers a chat request with HTTP 500"
    )


def test_without_a_channel_no_answer_is_busy_while_it_works_and_a_hang_when_not() -> None:
    policy = outside()
    policy.ready(0.0)
    policy.looked(60.0, 1.0)
    assert policy.looked(120.0, 100.0) == []  # saturated
    policy.answered(150.0)
    policy.looked(210.0, 130.0)
    assert dos(policy.looked(270.0, 130.1)) == ["term"]
    assert policy.ending == "the server hung: no answer for 120 s, and its processes did nothing (hangTimeout)"


def test_without_a_channel_a_refusal_is_the_end_once_it_was_ready() -> None:
    policy = outside()
    assert policy.refused(1.0) == []
    policy.ready(2.0)
    assert dos(policy.refused(3.0)) == ["term"]
    assert policy.refused(4.0) == []
    assert policy.last_error == "the server refuses connections, although its process runs"


def test_more_memory_than_its_limit_is_drained_and_counted_as_a_crash() -> None:
    policy = ready(memory_limit_bytes=1000)
    assert dos(policy.beat(1.0, {"rss_bytes": 1000})) == []
    assert dos(policy.beat(2.0, {"rss_bytes": 1001, "in_flight": 1})) == ["drain"]
    assert policy.drains
    assert policy.beat(3.0, {"rss_bytes": 1002, "in_flight": 1}) == []
    assert dos(policy.exited(4.0, "exit 0", left=False)) == ["wait"]
    assert policy.last_error == "the server uses 1,001 bytes of memory, more than its limit of 1,000 (memoryLimit)"
    assert policy.restarts == 1


def test_a_server_that_always_needs_too_much_memory_is_a_crash_loop() -> None:
    policy = ready(memory_limit_bytes=1000)
    ends = []
    while not policy.finished:
        policy.ready(1.0)
        policy.beat(2.0, {"rss_bytes": 2000})
        ends.append(crash(policy, 3.0))
    assert ends == [0.0, 0.5, 1.0, -1.0]
    assert "memoryLimit" in (policy.last_error or "")


def test_a_stop_while_a_hung_server_is_replaced_is_a_stop() -> None:
    policy = ready(memory_limit_bytes=1000)
    policy.beat(2.0, {"rss_bytes": 2000})
    assert policy.stop(3.0, 5.0) == []
    assert until_due(policy) == 8.0
    assert dos(policy.exited(4.0, "exit 0", left=False)) == ["finish"]
    assert policy.state == "stopped"
