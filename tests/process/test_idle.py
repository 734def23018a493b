"""A server that is unloaded when nobody uses it, and started by whoever connects."""

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from support.supervised import Launched, fake_host, fake_script, running
from support.waiting import until

from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]
IDLE_S = 0.4
EIGHT = 8


def unloaded(launched: Launched) -> int:
    """The pid of the server that was unloaded."""
    launched.until_state("idle")
    return launched.server_pids()[-1]


def test_what_nobody_uses_is_unloaded_in_good_order(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    pid = unloaded(launched)
    assert not running(pid)
    assert psutil.Process(launched.process.pid).children() == []
    status = launched.status()
    assert (status["server"], status["last_error"], status["listener"]) == (None, None, "owned")
    assert (status["draining"], status["activity"]["in_flight"]) == (False, 0)
    assert status["activity"]["idle_s"] >= IDLE_S
    assert status["start_s"] > 0
    assert launched.events()[-3:] == ["drain", "exit", "idle"]
    reasons = {line["reason"] for line in launched.journal() if line["event"] in ("drain", "exit", "idle")}
    assert reasons == {"no work for 0.4 s (idleTimeout)"}
    assert launched.state_file()["server"] is None
    assert launched.stop() == 0
    assert launched.state_file()["status"]["state"] == "stopped"


def test_eight_clients_at_once_start_one_server_and_all_are_answered(launch: Launch) -> None:
    launched = launch("--loading-s", "0.2", idle_timeout_s=IDLE_S, restart={"max_restarts": 0})
    for start in range(1, 4):
        gone = unloaded(launched)
        assert len(launched.server_pids()) == start
        with ThreadPoolExecutor(EIGHT) as clients:
            answers = set(clients.map(lambda _: launched.get(), range(EIGHT)))
        assert answers == {str(launched.server_pids()[-1])} != {str(gone)}
    assert len(launched.server_pids()) == 4
    launched.until_state("idle")
    assert launched.events().count("wake") == 3


def test_it_is_awake_for_both_addresses_and_shows_its_last_end(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    unloaded(launched)
    assert launched.get(host="::1") == str(launched.server_pids()[1])
    server = launched.until_state("ready")["server"]
    assert (server["restarts"], server["last_exit"]["reason"]) == (0, "no work for 0.4 s (idleTimeout)")


def test_a_server_at_work_is_never_unloaded(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    launched.until_state("ready")
    assert launched.get("/busy?20") == str(launched.server_pids()[0])
    assert launched.get("/slow") == str(launched.server_pids()[-1])
    busy = [line["event"] for line in launched.journal()]
    assert busy.count("spawn") == 1


def test_who_asks_without_a_pause_never_notices(launch: Launch) -> None:
    """Each request comes at about the time of the unloading: all are answered, by this server or the next."""
    launched = launch(idle_timeout_s=IDLE_S)
    launched.until_state("ready")
    answered = set()
    for n in range(12):
        answered.add(launched.get())
        time.sleep(IDLE_S + n / 25)
    assert answered <= {str(pid) for pid in launched.server_pids()}
    assert not {"crash", "wait", "term", "kill"} & set(launched.events())


def test_the_fallback_comes_back_as_the_fallback(launch: Launch) -> None:
    fallback = {**fake_host(), "name": "mlx-legacy"}
    launched = launch("--fault", "The weights are torn.", fallback=fallback, idle_timeout_s=IDLE_S)
    unloaded(launched)
    status = launched.status()
    assert (status["state"], status["backend"], status["rollback"]["automatic"]) == ("idle", "mlx-legacy", True)
    launched.get()
    status = launched.until_state("degraded")
    assert status["backend"] == "mlx-legacy"
    assert "The weights are torn" in status["rollback"]["reason"]


def test_a_restart_while_idle_proves_the_new_plan(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    unloaded(launched)
    launched.plan_next(idle_timeout_s=0.0)
    assert launched.restart() | {"changes": []} == launched.status()["reload"] | {"state": "done", "changes": []}
    assert launched.status()["state"] == "ready"
    assert launched.get() == str(launched.server_pids()[-1])


def test_a_plan_that_fails_while_idle_brings_the_last_one_back(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    unloaded(launched)
    launched.plan_next(backend=fake_host("--fault", "The weights are torn."))
    reload = launched.restart()
    assert (reload["state"], "torn" in reload["reason"]) == ("reverted", True)
    launched.until_state("idle")
    assert launched.get() == str(launched.server_pids()[-1])


def test_a_hangup_while_idle_starts_nothing_for_the_same_plan(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    unloaded(launched)
    launched.plan_next(notes=["only said"])
    launched.process.send_signal(signal.SIGHUP)
    assert launched.until_reloaded(1)["state"] == "done"
    assert (launched.status()["state"], len(launched.server_pids())) == ("idle", 1)
    launched.plan_next(stop_timeout_s=9.0)
    launched.process.send_signal(signal.SIGHUP)
    assert launched.until_reloaded(2)["state"] == "done"
    assert len(launched.server_pids()) == 2


def test_a_switch_while_idle_starts_what_is_asked_for(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S, fallback={**fake_host(), "name": "mlx-legacy"})
    unloaded(launched)
    answer = control.call(str(launched.instance), {"do": "switch", "to": "fallback", "reason": "wanted"})
    assert launched.until_reloaded(answer["data"]["reload_id"])["state"] == "done"
    assert launched.status()["backend"] == "mlx-legacy"
    unloaded(launched)
    launched.get()
    assert launched.until_state("degraded")["backend"] == "mlx-legacy"


def test_a_crash_after_waking_is_answered_as_any_other(launch: Launch) -> None:
    launched = launch(idle_timeout_s=IDLE_S)
    unloaded(launched)
    launched.get()
    launched.provoke("/kill")
    launched.until_restarts(1)
    unloaded(launched)


def test_nothing_is_loaded_before_it_is_asked_for(launch: Launch) -> None:
    launched = launch(idle_timeout_s=30.0, idle=True)
    status = launched.until_state("idle")
    assert (status["server"], status["start_s"], launched.server_pids()) == (None, None, [])
    assert launched.get() == str(launched.until_state("ready")["server"]["pid"])


@pytest.mark.parametrize("kind", ["without idleTimeout", "of a server that binds the port itself"])
def test_what_cannot_be_idle_is_started_at_once(launch: Launch, port: int, kind: str) -> None:
    if kind == "without idleTimeout":
        launched = launch(idle=True)
    else:
        launched = launch(idle=True, idle_timeout_s=IDLE_S, backend=fake_script(port))
    launched.until_state("ready")
    assert launched.status()["state"] == "ready"


def test_who_comes_while_it_is_unloaded_is_finished_first(launch: Launch) -> None:
    """The server still works on a request that came in between, for longer than stopTimeout."""
    launched = launch(idle_timeout_s=1.5, stop_timeout_s=1.0)
    pid = launched.until_state("ready")["server"]["pid"]
    answers: list[str] = []
    # Stopped, the supervisor hears of the work only after the beats that say that there is none.
    launched.process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    client = threading.Thread(target=lambda: answers.append(launched.get("/busy?25")))
    client.start()
    until(lambda: any(c.status == "ESTABLISHED" for c in psutil.Process(pid).net_connections("tcp")))
    launched.process.send_signal(signal.SIGCONT)
    client.join(20)
    assert answers == [str(pid)]
    assert "term" not in launched.events()


def test_idle_and_back_20_times_leaks_nothing(launch: Launch) -> None:
    launched = launch(idle_timeout_s=0.05)
    process = psutil.Process(launched.process.pid)

    def round_trip(times: int) -> None:
        for _ in range(times):
            launched.until_state("idle")
            with contextlib.suppress(
                OSError, http.client.HTTPException
            ):  # it may be unloaded before it has read the request
                launched.get()

    round_trip(5)
    fds, memory = process.num_fds(), process.memory_info().rss
    round_trip(20)
    launched.until_state("idle")
    until(lambda: process.num_fds() <= fds)
    assert process.memory_info().rss - memory < 1 << 20
    assert process.memory_info().rss <= 18 << 20
    assert not any(running(pid) for pid in launched.server_pids())


def test_a_killed_supervisor_leaves_nothing_of_a_server_that_is_being_woken(launch: Launch) -> None:
    launched = launch("--loading-s", "5", idle_timeout_s=30.0, idle=True)
    launched.until_state("idle")
    with socket.create_connection(("127.0.0.1", launched.port), timeout=5):
        until(lambda: launched.status()["phase"] == "loading")
        os.kill(launched.process.pid, signal.SIGKILL)
        until(lambda: not any(running(pid) for pid in launched.server_pids()))
