"""A second host that waits beside the server, and takes its place after a crash."""

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from support.supervised import Launched, fake_host, fake_script, running
from support.waiting import until

from mlx_launcher.supervisor import control, standby

Launch = Callable[..., Launched]


def waiting(launched: Launched, besides: int | None = None) -> int:
    """The pid of a standby that has been heard of, another one than `besides`."""

    def there() -> dict[str, Any] | None:
        seen: dict[str, Any] | None = launched.status()["standby"]
        return seen if seen and seen["rss_bytes"] and seen["pid"] != besides else None

    return int(until(there, 15.0, "a standby")["pid"])


def children(launched: Launched) -> set[int]:
    return {process.pid for process in psutil.Process(launched.process.pid).children() if running(process.pid)}


def test_it_waits_without_a_model_beside_a_server_that_is_ready(launch: Launch) -> None:
    launched = launch("--loading-s", "0.3", standby=True)
    assert launched.status()["standby"] is None
    server = launched.until_state("ready")["server"]["pid"]
    pid = waiting(launched)
    assert children(launched) == {server, pid}
    assert os.getpgid(pid) == os.getsid(pid) == pid
    status = launched.status()
    assert (status["state"], status["phase"], status["server"]["pid"]) == ("ready", None, server)
    assert launched.state_file()["standby"]["pid"] == pid
    assert {launched.get() for _ in range(20)} == {str(server)}  # it accepts nothing
    log = (launched.instance / "server.log").read_text()
    assert log.count("received activate") == 1
    assert launched.events().count("ready") == 1


def test_a_crash_is_answered_by_the_standby_and_another_one_follows(launch: Launch) -> None:
    launched = launch(standby=True)
    for crash in range(1, 4):
        server = launched.until_state("ready")["server"]["pid"]
        pid = waiting(launched)
        os.kill(server, signal.SIGKILL)
        launched.until_restarts(crash)
        assert launched.get() == str(pid)
        status = launched.until_state("ready")
        assert (status["server"]["pid"], status["server"]["restarts"]) == (pid, crash)
        assert waiting(launched, besides=pid) != pid
    spawns = [line["standby"] for line in launched.journal() if line["event"] == "spawn"]
    assert spawns == [False, True, True, True]
    assert len(children(launched)) == 2


def test_one_that_is_killed_is_replaced_and_costs_the_server_nothing(launch: Launch) -> None:
    launched = launch(standby=True, restart={"max_restarts": 0})
    server = launched.until_state("ready")["server"]["pid"]
    first = waiting(launched)
    os.kill(first, signal.SIGKILL)
    second = waiting(launched, besides=first)
    assert not running(first)
    status = launched.status()
    assert (status["server"]["pid"], status["server"]["restarts"], status["last_error"]) == (server, 0, None)
    assert children(launched) == {server, second}
    assert launched.state_file()["standby"]["pid"] == second


def test_one_that_dies_each_time_is_started_ever_more_seldom(launch: Launch) -> None:
    launched = launch("--die-waiting", standby=True)
    launched.until_state("ready")
    until(lambda: launched.events().count("standby_died") == 3, 20.0)
    died = [line for line in launched.journal() if line["event"] == "standby_died"]
    assert [line["pause_s"] for line in died] == [1.0, 2.0, 4.0]
    assert died[0]["reason"] == "the server exited with code 3"
    assert launched.status()["server"]["restarts"] == 0


def test_one_that_cannot_be_trusted_is_not_taken(launch: Launch) -> None:
    """Frozen, it could not load anything: the crash is answered with a start, and it is replaced."""
    launched = launch(standby=True)
    server = launched.until_state("ready")["server"]["pid"]
    frozen = waiting(launched)
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: "standby_died" in launched.events(), standby.SILENT_S + 5.0)
    os.kill(server, signal.SIGKILL)
    launched.until_restarts(1)
    assert launched.until_state("ready")["server"]["pid"] != frozen
    until(lambda: not running(frozen))
    waiting(launched, besides=frozen)


def test_a_standby_that_is_still_importing_is_taken_too(launch: Launch) -> None:
    launched = launch("--linger", "importing", standby=True)
    server = launched.until_state("ready")["server"]["pid"]
    pid = until(lambda: launched.status()["standby"])["pid"]
    os.kill(server, signal.SIGKILL)
    assert launched.get() == str(pid)


def test_stop_leaves_neither(launch: Launch) -> None:
    launched = launch(standby=True)
    server = launched.until_state("ready")["server"]["pid"]
    pid = waiting(launched)
    assert launched.stop() == 0
    assert not running(server)
    assert not running(pid)
    assert launched.refuses()
    assert (launched.state_file()["standby"], launched.state_file()["status"]["standby"]) == (None, None)


@pytest.mark.parametrize("arguments", [["--ignore-sigterm"], []], ids=["that ignores SIGTERM", "that is stopped"])
def test_stop_is_not_held_up_by_a_standby(launch: Launch, arguments: list[str]) -> None:
    launched = launch(standby=True)
    launched.until_state("ready")
    pid = waiting(launched)
    if not arguments:
        os.kill(pid, signal.SIGSTOP)
    assert launched.stop() == 0
    assert not running(pid)


def test_a_supervisor_that_is_killed_leaves_neither(launch: Launch) -> None:
    launched = launch(standby=True)
    both = {launched.until_state("ready")["server"]["pid"], waiting(launched)}
    os.kill(launched.process.pid, signal.SIGKILL)
    until(lambda: not any(map(running, both)))
    launched.process.wait(5)
    assert launch(standby=True).until_state("ready")


def test_a_standby_that_does_not_go_by_itself_is_found_by_the_next_supervisor(launch: Launch) -> None:
    launched = launch(standby=True)
    launched.until_state("ready")
    pid = waiting(launched)
    os.kill(pid, signal.SIGSTOP)
    os.kill(launched.process.pid, signal.SIGKILL)
    launched.process.wait(5)
    assert running(pid)
    again = launch(standby=True)
    assert not running(pid)
    again.until_state("ready")
    assert pid in [line["pid"] for line in again.journal() if line["event"] == "orphan"]


def test_kill_of_both_leaves_nothing_and_starts_anew(launch: Launch) -> None:
    launched = launch(standby=True)
    both = {launched.until_state("ready")["server"]["pid"], waiting(launched)}
    for pid in both:
        os.kill(pid, signal.SIGKILL)
    launched.until_restarts(1)
    assert launched.until_state("ready")["server"]["pid"] not in both
    waiting(launched)
    assert not children(launched) & both


def test_there_is_none_while_nothing_is_loaded(launch: Launch) -> None:
    launched = launch(standby=True, idle_timeout_s=1.5)
    launched.until_state("ready")
    first = waiting(launched)
    launched.until_state("idle")
    until(lambda: not children(launched))
    assert not running(first)
    assert launched.status()["standby"] is None
    launched.get()
    assert waiting(launched) != first


def test_another_plan_has_a_standby_of_its_own(launch: Launch) -> None:
    launched = launch(standby=True)
    launched.until_state("ready")
    first = waiting(launched)
    launched.plan_next(backend=fake_host("--secret", "other"), standby=True)
    assert launched.restart()["state"] == "done"
    second = waiting(launched, besides=first)
    assert "other" in psutil.Process(second).cmdline()
    assert not running(first)
    launched.plan_next(standby=False)
    assert launched.restart()["state"] == "done"
    until(lambda: not running(second))
    assert launched.status()["standby"] is None


def test_the_fallback_binds_the_port_although_there_was_a_standby(launch: Launch, port: int) -> None:
    """A standby holds the listeners: a server that binds the port itself could not, as long as one is there."""
    launched = launch(standby=True, fallback=fake_script(port), restart={"max_restarts": 0})
    launched.until_state("ready")
    pid = waiting(launched)
    launched.provoke("/kill")
    status = launched.until_state("degraded")
    assert (status["listener"], status["standby"], running(pid)) == ("lent", None, False)
    number = control.call(str(launched.instance), {"do": "switch", "to": "configured", "reason": "wanted"})
    assert launched.until_reloaded(number["data"]["reload_id"])["state"] == "done"
    waiting(launched)


def test_40_crashes_with_a_standby_leak_nothing(launch: Launch) -> None:
    launched = launch(standby=True, restart={"max_restarts": 10_000, "backoff_s": 0.0})
    process = psutil.Process(launched.process.pid)

    def crash(times: int) -> None:
        for _ in range(times):
            server = launched.until_state("ready")["server"]
            waiting(launched)
            os.kill(server["pid"], signal.SIGKILL)
            launched.until_restarts(server["restarts"] + 1)
        launched.until_state("ready")
        waiting(launched)

    crash(10)
    fds, memory = process.num_fds(), process.memory_info().rss
    crash(40)
    until(lambda: process.num_fds() <= fds)
    assert process.memory_info().rss - memory < 1 << 20
    assert process.memory_info().rss <= 18 << 20
    assert len(children(launched)) == 2
