"""Rows 2 to 4, 8, 9, 14, 15, 54 and 64 with a fake server, which can be made to do anything; test_server.py has the real one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
from support.launched import Crowd
from support.supervised import Launched, fake_script, running
from support.waiting import until

Launch = Callable[..., Launched]
FROZEN = "the server froze: no sign of life for 1 s, and its processes did nothing (freezeTimeout)"


@contextmanager
def asking(launched: Launched, *paths: str) -> Iterator[list[str]]:
    """Clients that ask once each and need not be answered; the answers that there were."""
    answers: list[str] = []

    def ask(path: str) -> None:
        answers.append(launched.get(path))

    def client(path: str) -> None:
        try:
            ask(path)
        except OSError:
            answers.append("")
        except Exception as error:
            answers.append(repr(error))

    threads = [threading.Thread(target=client, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def replaced(launched: Launched, pid: int, reason: str) -> None:
    """The server is another one by now, and everybody who asks is told why."""
    until(lambda: (launched.status()["server"] or {}).get("pid") not in (None, pid), 15)
    status = launched.until_state("ready")
    assert status["server"]["last_exit"]["reason"] == reason
    assert (status["server"]["restarts"], status["last_error"]) == (1, None)
    assert reason in [line.get("reason") for line in launched.journal() if line["event"] == "term"]
    assert not running(pid)


@pytest.mark.parametrize(("row", "phase"), [(2, "importing"), (3, "loading"), (4, "proving")])
def test_02_03_04_killed_while_it_starts_is_respawned_with_backoff_and_never_called_ready(
    launch: Launch, row: int, phase: str
) -> None:
    launched = launch("--linger", phase)
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=2) as crowd:
        for restarts in range(3):
            until(lambda: launched.status()["phase"] == phase)
            status = launched.status()
            assert status["state"] == ("restarting" if restarts else "starting")
            os.kill(status["server"]["pid"], signal.SIGKILL)
            launched.until_restarts(restarts + 1)
        launched.until_state("ready")
        until(lambda: crowd.answered > 10)
    assert (crowd.refused, crowd.errors) == ([], [])
    waits = [line["reason"] for line in launched.journal() if line["event"] == "wait"]
    assert [text.rpartition("next start in ")[2] for text in waits] == ["0.0 s", "0.1 s", "0.1 s"]
    assert launched.events().count("ready") == 1


def _is_a_pid(text: str) -> None:
    assert text.isdigit()


def test_08_frozen_while_idle_is_found_by_its_missing_beats(launch: Launch) -> None:
    launched = launch(freeze_timeout_s=1.0, stop_timeout_s=0.5)
    pid = launched.until_state("ready")["server"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    replaced(launched, pid, FROZEN)


def test_09_frozen_at_work_is_replaced_and_who_waits_is_answered_by_the_successor(launch: Launch) -> None:
    launched = launch(freeze_timeout_s=1.0, stop_timeout_s=0.5)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/freeze"):
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        with asking(launched, *["/pid"] * 10) as answers:
            pass
        replaced(launched, pid, FROZEN)
    assert answers == [str(launched.status()["server"]["pid"])] * 10


def test_08_without_beats_but_at_work_is_not_frozen(launch: Launch) -> None:
    launched = launch(freeze_timeout_s=0.6)
    pid = launched.until_state("ready")["server"]["pid"]
    assert launched.get("/spin?30") == str(pid)
    assert launched.status()["server"]["pid"] == pid
    assert "answers_trouble" in launched.events()


def test_14_busy_for_longer_than_any_timeout_is_left_alone(launch: Launch) -> None:
    launched = launch(hang_timeout_s=0.6, freeze_timeout_s=1.5)
    pid = launched.until_state("ready")["server"]["pid"]
    assert launched.get("/busy?40") == str(pid)
    status = launched.status()
    assert (status["state"], status["server"]["pid"], status["server"]["restarts"]) == ("ready", pid, 0)


def test_15_hung_is_ended_after_hang_timeout_with_its_reason(launch: Launch) -> None:
    launched = launch(hang_timeout_s=1.0, stop_timeout_s=0.5)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/hang"):
        replaced(launched, pid, "the server hung: requests in flight, and no progress for 1 s (hangTimeout)")


def test_15_a_start_that_stands_still_is_begun_anew_and_in_the_end_given_up(launch: Launch) -> None:
    launched = launch("--loading-s", "30", "--silent", hang_timeout_s=0.3, restart={"max_restarts": 1})
    assert launched.process.wait(15) == 1
    status = launched.state_file()["status"]
    assert "no progress for 0.3 s (hangTimeout)" in status["last_error"]
    assert len(launched.server_pids()) == 2


def test_54_beyond_its_memory_limit_it_finishes_what_is_in_flight_and_is_replaced(launch: Launch) -> None:
    launched = launch(memory_limit_bytes=1_000_000)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/slow") as slow:
        until(lambda: launched.status()["activity"]["in_flight"] == 1)
        assert launched.get("/rss?1000000") == str(pid)
        assert launched.get("/rss?1000001") == str(pid)
        until(lambda: launched.status()["draining"])
        assert launched.status()["state"] == "restarting"
    assert slow == [str(pid)]
    launched.until_restarts(1)
    status = launched.until_state("ready")
    reason = "the server uses 1,000,001 bytes of memory, more than its limit of 1,000,000 (memoryLimit)"
    assert status["server"]["last_exit"]["reason"] == reason
    assert [line["reason"] for line in launched.journal() if line["event"] == "drain"] == [reason]
    assert "term" not in launched.events()


def test_64_both_asleep_and_awake_again_nothing_is_ended(launch: Launch) -> None:
    launched = launch(hang_timeout_s=1.5, freeze_timeout_s=1.0)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/busy?30") as answers:
        until(lambda: launched.status()["activity"]["in_flight"] == 1)
        launched.process.send_signal(signal.SIGSTOP)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4.0)  # the gap itself
        launched.process.send_signal(signal.SIGCONT)
        os.kill(pid, signal.SIGCONT)
        assert launched.status()["server"]["pid"] == pid
    assert answers == [str(pid)]
    assert launched.status()["server"]["restarts"] == 0


# -- servers without a channel


def test_15_a_script_that_answers_nothing_and_does_nothing_is_hung(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port), hang_timeout_s=1.0)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/hang"):
        until(lambda: (launched.status()["server"] or {}).get("restarts") == 1, 15)
    status = launched.until_state("ready")
    reason = "the server hung: no answer for 1 s, and its processes did nothing (hangTimeout)"
    assert status["server"]["last_exit"]["reason"] == reason
    assert not running(pid)


def test_14_a_script_that_works_and_answers_nothing_is_saturated(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port), hang_timeout_s=1.0)
    pid = launched.until_state("ready")["server"]["pid"]
    assert launched.get("/spin?40") == str(pid)
    assert launched.status()["server"]["pid"] == pid
    troubles = [line["reason"] for line in launched.journal() if line["event"] == "answers_trouble"]
    assert "nothing is heard of it" in troubles


def test_15_a_script_that_refuses_connections_is_dead(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port), hang_timeout_s=4.0)
    pid = launched.until_state("ready")["server"]["pid"]
    with asking(launched, "/close"):
        until(lambda: (launched.status()["server"] or {}).get("restarts") == 1, 15)
    status = launched.until_state("ready")
    assert status["server"]["last_exit"]["reason"] == "the server refuses connections, although its process runs"
    assert not running(pid)


def test_03_a_script_that_only_answers_wrongly_is_given_up_with_its_reason(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port, "--health", '{"model_loaded": false}'), hang_timeout_s=2.0)
    assert launched.process.wait(20) == 1
    error = launched.state_file()["status"]["last_error"]
    assert error == "the server showed no progress for 2 s (hangTimeout): its /health says that no model is loaded"
    assert len(launched.server_pids()) == 1
