"""Another plan for a running supervisor: refused, done or reverted."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launched import Crowd
from support.supervised import ROOT, Launched, fake_host, fake_script, running
from support.waiting import until

from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


def test_a_restart_drains_and_serves_the_new_plan_on_the_same_sockets(launch: Launch) -> None:
    launched = launch()
    old = launched.until_state("ready")["server"]["pid"]
    launched.plan_next(model={"id": "other", "path": "/models/other"}, stop_timeout_s=10.0)
    answers: list[str] = []
    slow = threading.Thread(target=lambda: answers.append(launched.get("/slow")))
    slow.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=4) as crowd:
        reload = launched.restart()
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 10)
    slow.join()
    assert answers == [str(old)]  # what was in flight was finished
    assert (crowd.refused, crowd.errors) == ([], [])
    assert (reload["state"], reload["trigger"], reload["reason"], reload["exit"]) == ("done", "restart", None, None)
    assert reload["changes"] == [
        "model.id fake → other",
        "model.path /models/fake → /models/other",
        "stopTimeout 5 → 10",
    ]
    status = launched.status()
    assert (status["state"], status["model"]["id"], status["last_error"]) == ("ready", "other", None)
    assert (status["server"]["restarts"], status["server"]["pid"] != old) == (0, True)
    assert not running(old)
    changes = [line["change"] for line in launched.journal() if line["event"] == "plan_change"]
    assert changes == reload["changes"]
    assert "planning" in (launched.instance / "server.log").read_text()


def _is_a_pid(text: str) -> None:
    assert text.isdigit()


def test_while_it_drains_it_says_so_and_another_restart_is_told_to_wait(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next()
    client = threading.Thread(target=launched.provoke, args=("/slow",))
    client.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    assert control.call(str(launched.instance), {"do": "restart"}) == {"ok": True, "data": {"reload_id": 1}}
    status = until(lambda: (s := launched.status())["draining"] and s)
    assert (status["state"], status["reload"]["state"], status["listener"]) == ("ready", "switching", "owned")
    assert control.call(str(launched.instance), {"do": "restart"})["error"]["code"] == "busy"
    assert launched.until_reloaded(1)["state"] == "done"
    client.join()


def test_a_crash_after_a_restart_is_answered_with_the_plan_in_force(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next(model={"id": "other", "path": "/models/other"})
    assert launched.restart()["state"] == "done"
    launched.provoke("/kill")
    launched.until_restarts(1)
    assert launched.until_state("ready")["model"]["id"] == "other"
    # And it is now the one to go back to.
    launched.plan_next(backend=fake_host("--fault", "The weights are torn."))
    assert launched.restart()["state"] == "reverted"
    assert launched.until_state("ready")["model"]["id"] == "other"


REFUSED: list[tuple[Any, int, int, str]] = [
    ("", 4, 1, "ended with code 4 and without a plan"),
    ("nonsense", 0, 1, "without a plan"),
    ("[]", 0, 1, "without a plan"),
    ({"ok": True, "data": {"schema": 1}}, 0, 1, "plan.instance is missing"),
    ({"ok": False, "errors": []}, 4, 1, "without a plan"),
    ({"ok": False, "errors": [{"message": "port is a text", "hint": "Make it a number"}]}, 4, 4, "port is a text"),
    ("x" * 5_000_000, 0, 1, "larger than 4 MiB"),
]


@pytest.mark.parametrize(("said", "code", "exit_code", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_plan_is_refused_and_nothing_is_stopped(
    launch: Launch, said: Any, code: int, exit_code: int, reason: str
) -> None:
    launched = launch()
    pid = launched.until_state("ready")["server"]["pid"]
    launched.say_next(said, code)
    reload = launched.restart()
    assert (reload["state"], reload["exit"]) == ("refused", exit_code)
    assert reason in reload["reason"]
    assert reload["hint"]
    assert launched.get() == str(pid)
    assert launched.status()["state"] == "ready"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"port": 1}, "the port is now 1"), ({"hosts": ["127.0.0.1"]}, "the host"), ({"instance": "/x"}, "state dir")],
)
def test_what_a_restart_cannot_change_is_refused_with_the_remedy(
    launch: Launch, changes: dict[str, Any], reason: str
) -> None:
    launched = launch()
    pid = launched.until_state("ready")["server"]["pid"]
    launched.plan_next(**changes)
    reload = launched.restart()
    assert (reload["state"], reload["exit"]) == ("refused", 1)
    assert reason in reload["reason"]
    assert "stop" in reload["hint"]
    assert launched.get() == str(pid)


def test_a_command_that_is_gone_is_refused(launch: Launch) -> None:
    launched = launch(source={"argv": ["/nowhere/python"], "cwd": "/", "env": {}})
    launched.until_state("ready")
    reload = launched.restart()
    assert (reload["state"], reload["exit"]) == ("refused", 1)
    assert "/nowhere/python" in reload["reason"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--fault", "The weights are torn."], "The weights are torn. Look at it"),
        (["--die", "loading"], "3 crashes within 60 s of service, the last one: the server was ended by SIGKILL"),
        (["--loading-s", "9", "--silent"], "the server showed no progress for 0.5 s (hangTimeout)"),
    ],
)
def test_a_plan_that_does_not_come_up_is_replaced_by_the_last_known_good(
    launch: Launch, arguments: list[str], reason: str
) -> None:
    launched = launch()
    launched.until_state("ready")
    restart = {**launched.plan["restart"], "max_restarts": 2}
    model = {"id": "other", "path": "/models/other"}
    launched.plan_next(backend=fake_host(*arguments), restart=restart, hang_timeout_s=0.5, model=model)
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=2) as crowd:
        reload = launched.restart()
        status = launched.until_state("ready")
    assert (reload["state"], reload["reason"]) == ("reverted", reason)
    assert crowd.refused == []
    assert (status["model"]["id"], status["reload"]["state"]) == ("fake", "reverted")
    assert launched.get() == str(status["server"]["pid"])
    # And it can be tried again.
    launched.plan_next(model=model)
    assert launched.restart()["state"] == "done"
    assert launched.status()["model"]["id"] == "other"


def test_progress_keeps_a_slow_plan_on_trial(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next(backend=fake_host("--loading-s", "1.5"), hang_timeout_s=0.5)
    assert launched.restart()["state"] == "done"


def test_if_the_last_known_good_fails_too_both_reasons_are_told(launch: Launch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    launched = launch("--fault-if", str(broken))
    launched.until_state("ready")
    broken.touch()
    launched.plan_next(backend=fake_host("--fault", "The weights are torn."))
    control.call(str(launched.instance), {"do": "restart"})
    assert launched.process.wait(10) == 1
    state = launched.state_file()["status"]
    assert (state["state"], state["reload"]["state"]) == ("failed", "reverted")
    assert "broken later" in state["last_error"]
    assert "The weights are torn" in state["last_error"]


def test_secrets_are_in_no_status_no_journal_and_no_log(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    backend = fake_host("--secret", "sk-planted")
    backend = {**backend, "env": {"TOKEN": "sk-planted"}, "settings": {"a": 2, "api_key": "sk-planted", "max_queue": 9}}
    source = {**launched.plan["source"], "env": {**launched.plan["source"]["env"], "KEY": "sk-planted"}}
    launched.plan_next(backend=backend, source=source, fallback=backend)
    assert launched.restart()["changes"] == [
        "backend.argv changed",
        "backend.env changed",
        "backend.a 1 → 2",
        "backend.apiKey changed",
        "backend.maxQueue null → 9",
        "fallback changed",
        "source changed",
    ]
    assert "sk-planted" not in str(launched.status())
    files = [path for path in launched.instance.rglob("*") if path.is_file()]
    assert [path for path in files if b"sk-planted" in path.read_bytes()] == []


def test_a_stop_ends_the_command_that_plans(launch: Launch) -> None:
    launched = launch(source={"argv": ["sleep", "60"], "cwd": "/", "env": {"PATH": os.environ["PATH"]}})
    launched.until_state("ready")
    control.call(str(launched.instance), {"do": "restart"})
    assert control.call(str(launched.instance), {"do": "restart"})["error"]["code"] == "busy"
    assert launched.stop() == 0
    reload = launched.state_file()["status"]["reload"]
    assert (reload["state"], reload["reason"]) == ("refused", "the server was asked to stop")
    command = ["pgrep", "-P", str(launched.process.pid)]
    assert subprocess.run(command, stdout=subprocess.PIPE).stdout == b""


def test_a_stop_in_the_middle_of_a_switch_is_orderly(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next(backend=fake_host("--loading-s", "30"))
    control.call(str(launched.instance), {"do": "restart"})
    until(lambda: launched.status()["phase"] == "loading")
    assert launched.stop() == 0
    assert launched.state_file()["status"]["state"] == "stopped"
    assert not any(running(pid) for pid in launched.server_pids())


def test_hangup_reloads_only_what_changed(launch: Launch) -> None:
    launched = launch()
    pid = launched.until_state("ready")["server"]["pid"]
    launched.plan_next(notes=["only said"])
    launched.process.send_signal(signal.SIGHUP)
    reload = launched.until_reloaded(1)
    assert (reload["state"], reload["trigger"], reload["changes"]) == ("done", "SIGHUP", [])
    assert launched.get() == str(pid)
    launched.plan_next(stop_timeout_s=9.0, notes=["only said"])
    launched.process.send_signal(signal.SIGHUP)
    reload = launched.until_reloaded(2)
    assert (reload["state"], reload["changes"]) == ("done", ["stopTimeout 5 → 9"])
    assert launched.get() != str(pid)
    assert [line["text"] for line in launched.journal() if line["event"] == "warning"] == ["only said"]


def test_a_hangup_during_a_reload_is_not_forgotten(launch: Launch) -> None:
    launched = launch(source={"argv": ["sh", "-c", "sleep 0.5"], "cwd": "/", "env": {"PATH": os.environ["PATH"]}})
    launched.until_state("ready")
    for _ in range(3):
        launched.process.send_signal(signal.SIGHUP)
        until(lambda: launched.status()["reload"])
    assert launched.until_reloaded(2)["state"] == "refused"
    assert launched.status()["reload"]["id"] == 2


def test_a_terminal_that_is_closed_is_no_reload(launch: Launch, tmp_path: Path) -> None:
    """`run` in a window that is closed: the kernel sends SIGHUP, and the terminal is gone."""
    launched = launch()
    launched.stop()
    master, slave = pty.openpty()
    with (tmp_path / "plan").open("w+") as file:
        json.dump(launched.plan, file)
        file.flush()
        argv = [sys.executable, "-m", "mlx_launcher.supervisor", "--plan-fd", str(file.fileno()), "--foreground"]
        launched.process = subprocess.Popen(
            argv, pass_fds=[file.fileno()], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True
        )
    os.close(slave)
    until(lambda: (launched.instance / "control.sock").exists())
    launched.until_state("ready")
    os.close(master)
    launched.process.send_signal(signal.SIGHUP)
    assert launched.process.wait(10) == 0


def test_a_restart_may_change_who_binds_the_port(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.plan_next(backend=fake_script(launched.port))
    assert launched.restart()["state"] == "done"
    assert launched.status()["listener"] == "lent"
    launched.plan_next()
    assert launched.restart()["state"] == "done"
    status = launched.status()
    assert (status["listener"], launched.get(host="::1")) == ("owned", str(status["server"]["pid"]))
