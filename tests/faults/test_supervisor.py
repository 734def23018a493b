"""Rows 10 to 28, 66 and 69 of the list of faults, as far as the supervisor alone is concerned: its server is a fake one."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.launched import Launcher
from support.supervised import FAKE_SCRIPT, Launched, fake_script, running
from support.waiting import until

from mlx_launcher.demo import build_demo
from mlx_launcher.supervisor import control, loop
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import Port
from mlx_launcher.supervisor.terminal import Terminal

Launch = Callable[..., Launched]


# -- the server process


@pytest.mark.parametrize(
    ("row", "reason"),
    [("SIGTERM", "ended by SIGTERM"), ("/exit0", "exited with code 0"), ("/die", "exited with code 3")],
)
def test_10_11_an_end_that_nobody_asked_for_is_a_crash(launch: Launch, row: str, reason: str) -> None:
    launched = launch()
    pid = launched.until_state("ready")["server"]["pid"]
    if row == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
    else:
        launched.provoke(row)
    launched.until_restarts(1)
    status = launched.until_state("ready")
    assert reason in status["server"]["last_exit"]["reason"]
    assert status["last_error"] is None
    assert status["server"]["pid"] != pid


def test_12_sigterm_ignored_ends_with_sigkill_in_the_journal(launch: Launch) -> None:
    launched = launch("--ignore-sigterm", "--ignore-channel", stop_timeout_s=0.3)
    pid = launched.until_state("ready")["server"]["pid"]
    began = time.monotonic()
    assert launched.stop() == 0
    assert time.monotonic() - began >= 0.6  # its time to drain, and as much again after SIGTERM
    assert not running(pid)
    events = launched.events()
    assert [e for e in events if e in ("drain", "term", "kill")] == ["drain", "term", "kill"]


@pytest.mark.parametrize("how", ["stop", "crash", "restart"])
def test_13_a_grandchild_is_gone_with_its_server(launch: Launch, tmp_path: Path, how: str) -> None:
    file = tmp_path / "grandchild"
    launched = launch("--grandchild", str(file), stop_timeout_s=0.5)
    server = launched.until_state("ready")["server"]["pid"]
    grandchild = int(until(lambda: file.exists() and file.read_text()))
    until(lambda: "grandchild" in Path(launched.plan["log_file"]).read_text().split("\n"))
    if how == "crash":
        os.kill(server, signal.SIGKILL)
        launched.until_restarts(1)
    elif how == "restart":
        launched.plan_next()
        assert launched.restart()["state"] == "done"
    else:
        assert launched.stop() == 0
    assert not running(grandchild)
    assert "kill" in launched.events()


# -- the supervisor is killed


@pytest.mark.parametrize("when", ["18 ready", "19 starting", "20 draining"])
def test_18_19_20_a_killed_supervisor_leaves_nothing_and_the_next_starts(launch: Launch, when: str) -> None:
    first = launch(*(["--loading-s", "30"] if when == "19 starting" else []))
    if when == "19 starting":
        until(lambda: first.status()["phase"] == "loading")
    else:
        first.until_state("ready")
    pid = first.status()["server"]["pid"]
    client = threading.Thread(target=first.provoke, args=("/slow",))
    if when == "20 draining":
        client.start()
        until(lambda: first.status()["activity"]["in_flight"] == 1)
        control.call(str(first.instance), {"do": "stop"})
    first.process.kill()
    first.process.wait()
    second = launch()
    assert second.report == {"ok": True, "pid": second.process.pid}
    assert not running(pid)
    second.until_state("ready")
    if when == "20 draining":
        client.join()


def test_20_killed_during_a_switch_between_plans(launch: Launch) -> None:
    first = launch()
    first.until_state("ready")
    first.plan_next()
    client = threading.Thread(target=first.provoke, args=("/slow",))
    client.start()
    until(lambda: first.status()["activity"]["in_flight"] == 1)
    control.call(str(first.instance), {"do": "restart"})
    until(lambda: first.status()["draining"])
    first.process.kill()
    first.process.wait()
    assert launch().until_state("ready")
    assert not running(first.server_pids()[0])
    client.join()


def test_21_the_script_that_a_killed_supervisor_left_is_found_and_ended(
    launch: Launch, port: int, tmp_path: Path
) -> None:
    file = tmp_path / "grandchild"
    first = launch(backend=fake_script(port, "--grandchild", str(file)))
    pid = first.until_state("ready")["server"]["pid"]
    grandchild = int(file.read_text())
    first.process.kill()
    first.process.wait()
    assert first.get() == str(pid)  # nothing told it
    began = time.monotonic()
    second = launch(backend=fake_script(port), stop_timeout_s=60.0)
    assert second.report == {"ok": True, "pid": second.process.pid}
    assert time.monotonic() - began < 60.0  # it is not waited for: it would not go by itself
    assert not running(pid)
    assert not running(grandchild)
    assert [e for e in second.events() if e.startswith("orphan")] == ["orphan", "orphan_signalled"]
    assert second.until_state("ready")["server"]["pid"] != pid


def test_21_with_the_real_command_and_a_script_of_the_user(launcher: Launcher, tmp_path: Path) -> None:
    build_demo(tmp_path / "a model")
    (tmp_path / "my server.sh").write_text(f'exec "{sys.executable}" "{FAKE_SCRIPT}" --port "$2" --bind-s 0.5\n')
    block = {"port": launcher.port, "modelPath": "a model", "serverScript": "my server.sh"}
    file = tmp_path / "rc.json"
    file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": block}}))
    for _ in range(2):
        done = launcher.command("--config", str(file), "start")
        assert done.returncode == 0, done.stderr
        status = launcher.status()
        assert (status["state"], status["listener"]) == ("ready", "lent")
        os.kill(status["supervisor"]["pid"], signal.SIGKILL)
        assert running(status["server"]["pid"])
    # The next start ends what was left and has the port.
    done = launcher.command("--config", str(file), "start", "--no-wait")
    assert done.returncode == 0, done.stderr
    assert not running(status["server"]["pid"])
    assert launcher.command("stop").returncode == 0
    assert launcher.processes() == []


@pytest.mark.parametrize("goes", [True, False])
def test_66_start_at_once_after_a_kill_is_no_port_taken(launch: Launch, goes: bool) -> None:
    first = launch(*([] if goes else ["--ignore-channel"]))
    pid = first.until_state("ready")["server"]["pid"]
    first.process.kill()
    if not goes:
        first.process.wait()
        assert not first.refuses()  # its server holds the port
    second = launch()
    assert second.report == {"ok": True, "pid": second.process.pid}
    assert second.until_state("ready")["server"]["pid"] != pid
    assert not running(pid)
    assert ("orphan_signalled" in second.events()) is not goes


# -- signals


def test_22_a_second_sigterm_skips_the_drain(launch: Launch) -> None:
    launched = launch(stop_timeout_s=20.0)
    launched.until_state("ready")
    client = threading.Thread(target=launched.provoke, args=("/slow",))
    client.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    launched.process.terminate()
    until(lambda: launched.status()["draining"])
    launched.process.terminate()
    assert launched.process.wait(0.9) == 0  # sooner than the answer
    client.join()
    assert launched.events()[-4:] == ["stop", "term", "exit", "finish"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_22_signals_while_starting(launch: Launch, number: signal.Signals) -> None:
    launched = launch("--loading-s", "30")
    until(lambda: launched.status()["phase"] == "loading")
    pid = launched.server_pids()[0]
    launched.plan_next()
    launched.process.send_signal(signal.SIGHUP)  # the same plan: nothing to do
    assert launched.until_reloaded(1)["state"] == "done"
    assert launched.server_pids() == [pid]
    launched.plan_next(stop_timeout_s=3.0)
    launched.process.send_signal(signal.SIGHUP)  # another one: the start is begun anew
    until(lambda: len(launched.server_pids()) == 2)
    assert not running(pid)
    launched.process.send_signal(number)
    assert launched.process.wait(5) == 0
    assert launched.state_file()["status"]["state"] == "stopped"
    assert not running(launched.server_pids()[1])


def test_22_sigterm_as_early_as_can_be(launch: Launch) -> None:
    launched = launch()
    launched.process.terminate()
    assert launched.process.wait(5) == 0
    assert launched.state_file()["status"]["state"] == "stopped"


def test_23_twenty_starts_at_once_are_one_server_and_twenty_truthful_answers(launcher: Launcher) -> None:
    argv = [sys.executable, "-m", "mlx_launcher", "--json", f"--state-dir={launcher.state_dir}", "--no-config"]
    argv += ["start", "--demo", f"--port={launcher.port}"]
    environment = {**os.environ, "MLX_LAUNCH_TEST": str(launcher.state_dir)}
    starts = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(20)]
    answers = [json.loads(process.communicate(timeout=100)[0]) for process in starts]
    assert [process.returncode for process in starts] == [0] * 20
    assert [answer["data"]["state"] for answer in answers] == ["ready"] * 20
    assert sorted(answer["data"]["already_running"] for answer in answers) == [False] + [True] * 19
    assert len({answer["data"]["supervisor"]["pid"] for answer in answers}) == 1
    assert len({answer["data"]["server"]["pid"] for answer in answers}) == 1
    assert len(launcher.processes()) == 2


# -- time and limits


class Clock:
    """What the loop takes for `time`: a clock that is turned by the test, and a calendar that is never right."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_27_a_clock_that_jumps_moves_no_deadline(launch: Launch, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: the loop's clock jumps forward by a day and back; its own time, which all deadlines use, does not."""
    launched = launch()
    assert launched.stop() == 0  # only its plan and its directory are wanted
    monkeypatch.chdir(launched.instance)
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    wake, _feed = socket.socketpair()
    plan: Any = launched.plan
    supervisor = loop.Supervisor(plan, Port([], port, print), Journal("journal.jsonl"), wake, Terminal(False))

    def look(jump: float) -> float:
        before = supervisor._now
        clock.now += jump
        supervisor._look(0.0)
        return supervisor._now - before

    supervisor._policy.begin(0.0)
    supervisor._policy.deadline = 30.0  # a backoff
    assert look(0.01) == pytest.approx(0.01)
    for jump in (86_400.0, -86_400.0, 3600.0, -1e9):
        assert look(jump) == 0.0
    assert look(0.5) == pytest.approx(0.5)
    assert supervisor._policy.deadline == 30.0
    assert launched.events().count("spawn") == 1  # none but the first, before the clock was turned
    wake.close()
    _feed.close()


def test_28_few_descriptors_and_200_restarts_leak_nothing(launch: Launch) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    launched = launch(restart={"max_restarts": 10_000, "backoff_s": 0.0}, preexec=limit)
    launched.until_state("ready")
    process = psutil.Process(launched.process.pid)

    def crash(times: int) -> None:
        for _ in range(times):
            server = launched.until_state("ready")["server"]
            os.kill(server["pid"], signal.SIGKILL)
            launched.until_restarts(server["restarts"] + 1)
        launched.until_state("ready")

    crash(10)
    fds, memory = process.num_fds(), process.memory_info().rss
    crash(200)
    until(lambda: process.num_fds() <= fds)  # the client of the last status may not be closed yet
    assert process.memory_info().rss - memory < 1 << 20
    assert process.num_threads() == 1


def test_28_reloads_leak_nothing(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    process = psutil.Process(launched.process.pid)

    def reload() -> None:
        launched.plan_next()
        assert launched.restart()["state"] == "done"
        launched.refuse_next("no", "", 4)
        assert launched.restart()["state"] == "refused"

    reload()
    fds, memory = process.num_fds(), process.memory_info().rss
    for _ in range(15):
        reload()
    until(lambda: process.num_fds() <= fds)
    assert process.memory_info().rss - memory < 1 << 20


def test_69_a_state_directory_of_200_characters(launch: Launch, tmp_path: Path) -> None:
    instance = tmp_path / ("d" * 100) / ("e" * 100) / "8081"
    launched = launch(instance=instance)
    here = Path.cwd()
    assert launched.until_state("ready")["server"]
    assert launched.stop() == 0
    with pytest.raises(control.NotRunning):
        launched.status()
    assert Path.cwd() == here
