"""The supervisor with a server that dies, hangs on, lies and floods."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.supervised import Launched, make_plan, running
from support.waiting import until

from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


class Hammer:
    """Clients that ask without a pause, each request on a connection of its own."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self.answered = self.failed = self.refused = 0
        self._port = port
        self._lock = threading.Lock()
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]

    def _work(self) -> None:
        while not self._enough.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
            what = "answered"
            try:
                connection.request("GET", "/pid")
                connection.getresponse().read()
            except ConnectionRefusedError:
                what = "refused"
            except (OSError, http.client.HTTPException):
                what = "failed"
            connection.close()
            with self._lock:
                setattr(self, what, getattr(self, what) + 1)

    def __enter__(self) -> "Hammer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()


def test_phases_then_ready_then_an_orderly_stop(launch: Launch) -> None:
    launched = launch("--loading-s", "0.4")
    assert launched.report == {"ok": True, "pid": launched.process.pid}
    seen: list[tuple[str, str | None]] = []
    progress = set()

    def ready() -> bool:
        status = launched.status()
        seen.append((status["state"], status["phase"]))
        if status["progress"]:
            progress.add((status["phase"], status["progress"]["total"]))
        return bool(status["state"] == "ready")

    until(ready)
    # Never ready with a phase, never another phase than these, and in this order.
    order = [("starting", "importing"), ("starting", "loading"), ("starting", "proving"), ("ready", None)]
    assert [order.index(s) for s in seen] == sorted(order.index(s) for s in seen)
    assert progress == {("loading", 100)}
    assert launched.get() == launched.get(host="::1") == str(launched.status()["server"]["pid"])
    assert launched.stop() == 0
    assert launched.refuses()
    assert launched.events()[-3:] == ["drain", "exit", "finish"]
    final = launched.state_file()
    assert (final["status"]["state"], final["server"], final["status"]["server"]) == ("stopped", None, None)
    assert "received activate" in (launched.instance / "server.log").read_text()
    assert not (launched.instance / "control.sock").exists()


def test_files_are_private(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in [launched.instance, *launched.instance.iterdir()]}
    assert set(modes.values()) == {"0o600", "0o700"}
    assert [name for name, mode in modes.items() if mode == "0o700"] == [launched.instance.name]
    assert {"lock", "state.json", "control.sock", "server.log", "journal.jsonl"} < set(modes)


def test_state_file_names_the_server_while_it_runs(launch: Launch) -> None:
    launched = launch()
    server = launched.until_state("ready")["server"]
    state = launched.state_file()
    assert (state["schema"], state["pid"], state["server"]["pid"]) == (1, launched.process.pid, server["pid"])
    assert state["pid_started"]
    assert state["server"]["started"]
    assert state["status"].keys() == launched.status().keys()


def test_kill_9_is_answered_with_a_new_server_and_nobody_is_refused(launch: Launch) -> None:
    launched = launch(restart={"max_restarts": 9})
    launched.until_state("ready")
    with Hammer(launched.port) as hammer:
        for n in range(4):
            os.kill(launched.until_state("ready")["server"]["pid"], signal.SIGKILL)
            launched.until_restarts(n + 1)
        launched.until_state("ready")
        answered = hammer.answered
        until(lambda: hammer.answered > answered + 20)
    assert hammer.refused == 0
    assert hammer.failed <= 4 * 4  # at most what was in flight each time
    assert len(set(launched.server_pids())) == 5
    last_exit = launched.status()["server"]["last_exit"]
    assert (last_exit["signal"], last_exit["code"]) == ("SIGKILL", None)


@pytest.mark.parametrize("phase", ["importing", "loading", "proving", "ready"])
def test_a_crash_loop_ends_failed_and_releases_the_port(launch: Launch, phase: str) -> None:
    launched = launch("--die", phase, restart={"max_restarts": 2})
    assert launched.process.wait(10) == 1
    assert launched.refuses()
    state = launched.state_file()
    assert (state["status"]["state"], state["server"]) == ("failed", None)
    assert "3 crashes" in state["status"]["last_error"]
    assert "SIGKILL" in state["status"]["last_error"]
    assert len(launched.server_pids()) == 3
    assert ("ready" in launched.events()) is (phase == "ready")
    with pytest.raises(control.NotRunning):
        launched.status()


def test_a_fault_before_ready_is_not_retried(launch: Launch) -> None:
    launched = launch("--fault", "The weights are torn.")
    assert launched.process.wait(10) == 1
    assert launched.state_file()["status"]["last_error"] == "The weights are torn. Look at it"
    assert len(launched.server_pids()) == 1


def test_a_fault_is_heard_although_its_host_is_gone(launch: Launch) -> None:
    """The exit is seen in the same round as the lines before it, which are more than one read takes."""
    launched = launch("--loading-s", "0.3", "--garbage", "--fault", "The weights are torn.")
    host = until(lambda: launched.status()["server"])["pid"]
    launched.process.send_signal(signal.SIGSTOP)
    until(lambda: not running(host))
    launched.process.send_signal(signal.SIGCONT)
    assert launched.process.wait(10) == 1
    assert launched.state_file()["status"]["last_error"] == "The weights are torn. Look at it"
    assert len(launched.server_pids()) == 1


def test_a_fault_after_ready_is_a_crash(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.provoke("/fault")
    until(lambda: (launched.status()["server"] or {}).get("restarts") == 1)
    launched.until_state("ready")


def test_a_program_that_does_not_exist_is_named(launch: Launch, instance: Path, port: int) -> None:
    backend = {**make_plan(instance, port)["backend"], "argv": ["/nowhere/python"]}
    launched = launch(backend=backend)
    assert launched.process.wait(10) == 1
    assert "/nowhere/python" in launched.state_file()["status"]["last_error"]


def test_requests_in_flight_are_finished_before_the_end(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    answers: list[str] = []
    client = threading.Thread(target=lambda: answers.append(launched.get("/slow")))
    client.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    control.call(str(launched.instance), {"do": "stop"})
    until(launched.refuses, 1.0)
    assert launched.status()["draining"] is True
    assert launched.process.wait(10) == 0
    client.join()
    assert answers == [str(launched.server_pids()[0])]


def test_a_second_supervisor_is_refused(launch: Launch) -> None:
    first = launch()
    second = launch()
    assert second.report is not None
    assert (second.report["ok"], second.report["error"]["code"], second.report["exit"]) == (False, "already_running", 1)
    assert str(first.process.pid) in second.report["error"]["message"]
    assert second.process.wait(5) == 1
    first.until_state("ready")


def test_without_a_report_descriptor_the_error_is_one_line(launch: Launch) -> None:
    launch()
    second = launch(report=False)
    assert second.process.wait(5) == 1
    assert second.process.stderr is not None
    text = second.process.stderr.read().decode()
    assert text.startswith("mlx-launch: a supervisor (pid ")
    assert text.count("\n") == 1


def test_garbage_on_the_channel_is_dropped_and_journaled_once(launch: Launch) -> None:
    launched = launch("--garbage")
    launched.until_state("ready")
    assert launched.events().count("channel_trouble") == 1


def test_a_stopped_supervisor_forgives_the_gap(launch: Launch) -> None:
    launched = launch(stop_timeout_s=1.5)
    launched.until_state("ready")
    client = threading.Thread(target=launched.provoke, args=("/slow",))
    client.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    control.call(str(launched.instance), {"do": "stop", "timeout_s": 3.0})
    launched.process.send_signal(signal.SIGSTOP)
    os.kill(launched.server_pids()[0], signal.SIGSTOP)
    time.sleep(3.5)
    os.kill(launched.server_pids()[0], signal.SIGCONT)
    launched.process.send_signal(signal.SIGCONT)
    assert launched.process.wait(5) == 0
    client.join()
    assert "term" not in launched.events()


def test_foreground_tells_a_person(launch: Launch) -> None:
    launched = launch("--loading-s", "0.3", foreground=True, report=False)
    until(lambda: (launched.instance / "control.sock").exists())
    launched.until_state("ready")
    launched.provoke("/kill")
    until(lambda: (launched.status()["server"] or {}).get("restarts") == 1)
    launched.until_state("ready")
    launched.stop()
    assert launched.process.stdout is not None
    lines = launched.process.stdout.read().decode().splitlines()
    assert lines[0] == f"listening on 127.0.0.1, ::1 port {launched.port}"
    assert lines.index("importing") < lines.index("proving") < lines.index(f"ready {launched.plan['url']}")
    assert any(line.startswith("loading ") and line.endswith(" %") for line in lines)
    assert "restarting: the server was ended by SIGKILL" in lines
    assert lines[-1] == "stopped"


def test_what_no_terminal_can_show_does_not_end_it(launch: Launch) -> None:
    launched = launch("--fault", "no weights in /models/\udcff", foreground=True, report=False)
    assert launched.process.wait(10) == 1
    assert launched.process.stdout is not None
    assert "failed: no weights in /models/?. Look at it" in launched.process.stdout.read().decode().splitlines()
    assert "bug" not in launched.events()


def test_a_log_that_cannot_be_read_back_does_not_keep_it_from_ending(launch: Launch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    launched = launch("--fault", "torn", foreground=True, report=False, log_file=str(tmp_path / "log"))
    assert launched.process.wait(10) == 1


def test_imports_little_and_stays_small(launch: Launch) -> None:
    code = "import sys, mlx_launcher.supervisor.__main__; print(*sys.modules)"
    modules = set(
        subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2]).split()
    )
    too_much = {"click", "yaml", "pydantic", "mlx", "asyncio", "http", "email", "psutil"}
    too_much |= {"pathlib", "argparse", "logging", "dataclasses", "inspect", "tempfile", "urllib"}
    assert not modules & too_much
    launched = launch()
    launched.until_state("ready")
    assert psutil.Process(launched.process.pid).memory_info().rss <= 18 << 20


def test_a_plan_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text('{"schema": 1}')
    with (tmp_path / "plan").open() as file:
        argv = [sys.executable, "-m", "mlx_launcher.supervisor", "--plan-fd", str(file.fileno())]
        done = subprocess.run(
            argv, pass_fds=[file.fileno()], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-launch: the plan cannot be used")
    assert done.stderr.count("\n") == 1


def test_clients_wait_in_the_queue_while_no_server_is_ready(launch: Launch) -> None:
    launched = launch("--loading-s", "0.5")
    sockets = [socket.create_connection(("127.0.0.1", launched.port), timeout=5) for _ in range(60)]
    for sock in sockets:
        sock.sendall(b"GET /pid HTTP/1.1\r\n\r\n")
    answers = {sock.recv(1000).partition(b"\r\n")[0] for sock in sockets}
    for sock in sockets:
        sock.close()
    assert answers == {b"HTTP/1.1 200 OK"}
