"""The supervisor with a server that dies, hangs on, lies and floods."""

import http.client
import json
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


@pytest.mark.parametrize(("path", "reason"), [("/die", "the server exited with code 3"), ("/exit0", "code 0")])
def test_an_exit_by_itself_is_a_crash(launch: Launch, path: str, reason: str) -> None:
    launched = launch()
    launched.until_state("ready")
    launched.provoke(path)
    until(lambda: (launched.status()["server"] or {}).get("restarts") == 1)
    status = launched.until_state("ready")
    assert reason in status["server"]["last_exit"]["reason"]
    assert status["last_error"] is None


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


def test_sigterm_ignored_ends_with_sigkill_in_the_journal(launch: Launch) -> None:
    launched = launch("--ignore-sigterm", "--ignore-channel", stop_timeout_s=0.3)
    pid = launched.until_state("ready")["server"]["pid"]
    began = time.monotonic()
    assert launched.stop() == 0
    assert 0.6 <= time.monotonic() - began < 4
    assert not running(pid)
    events = launched.events()
    assert [e for e in events if e in ("drain", "term", "kill")] == ["drain", "term", "kill"]


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_a_grandchild_is_gone_with_its_server(launch: Launch, tmp_path: Path, how: str) -> None:
    file = tmp_path / "grandchild"
    launched = launch("--grandchild", str(file), stop_timeout_s=0.5)
    server = launched.until_state("ready")["server"]["pid"]
    grandchild = int(until(lambda: file.exists() and file.read_text()))
    until(lambda: "grandchild" in Path(launched.plan["log_file"]).read_text().split("\n"))
    if how == "crash":
        os.kill(server, signal.SIGKILL)
        until(lambda: (launched.status()["server"] or {}).get("restarts") == 1)
    else:
        assert launched.stop() == 0
    assert not running(grandchild)
    assert "kill" in launched.events()


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


def test_a_second_sigterm_skips_the_drain(launch: Launch) -> None:
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
def test_signals_while_starting(launch: Launch, number: signal.Signals) -> None:
    launched = launch("--loading-s", "30")
    until(lambda: launched.status()["phase"] == "loading")
    launched.process.send_signal(signal.SIGHUP)
    until(lambda: "hangup_ignored" in launched.events())
    launched.process.send_signal(number)
    assert launched.process.wait(5) == 0
    assert launched.state_file()["status"]["state"] == "stopped"
    assert not running(launched.server_pids()[0])


def test_sigterm_as_early_as_can_be(launch: Launch) -> None:
    launched = launch()
    launched.process.terminate()
    assert launched.process.wait(5) == 0
    assert launched.state_file()["status"]["state"] == "stopped"


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


@pytest.mark.parametrize("when", ["starting", "ready", "draining"])
def test_a_killed_supervisor_leaves_nothing_and_the_next_starts(launch: Launch, when: str) -> None:
    first = launch(*(["--loading-s", "30"] if when == "starting" else []))
    if when == "starting":
        until(lambda: first.status()["phase"] == "loading")
    else:
        first.until_state("ready")
    pid = first.status()["server"]["pid"]
    client = threading.Thread(target=first.provoke, args=("/slow",))
    if when == "draining":
        client.start()
        until(lambda: first.status()["activity"]["in_flight"] == 1)
        control.call(str(first.instance), {"do": "stop"})
    first.process.kill()
    first.process.wait()
    second = launch()
    assert second.report == {"ok": True, "pid": second.process.pid}
    assert not running(pid)
    second.until_state("ready")
    if when == "draining":
        client.join()


def test_what_a_killed_supervisor_left_is_ended_if_it_does_not_go(launch: Launch) -> None:
    first = launch("--ignore-channel")
    pid = first.until_state("ready")["server"]["pid"]
    first.process.kill()
    first.process.wait()
    assert not first.refuses()  # it holds the port
    second = launch()
    assert second.report is not None
    assert second.report["ok"]
    assert not running(pid)
    assert [e for e in second.events() if e.startswith("orphan")] == ["orphan", "orphan_signalled"]


@pytest.mark.parametrize("left", ["{", "[]", '{"schema": 9}', '{"schema": 1, "server": {"pid": "x"}}', "stranger"])
def test_a_state_file_that_means_nothing_is_ignored(launch: Launch, instance: Path, left: str) -> None:
    instance.mkdir(parents=True)
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(30)"], start_new_session=True)
    try:
        if left == "stranger":  # a pid that was reused: the same number, another start
            left = json.dumps({"schema": 1, "server": {"pid": stranger.pid, "started": 1.5}})
        (instance / "state.json").write_text(left)
        (instance / "control.sock").write_text("left over")
        launched = launch()
        launched.until_state("ready")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_flood_is_rotated_and_costs_no_memory(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    process = psutil.Process(launched.process.pid)
    launched.get("/flood?3000000")
    before = process.memory_info().rss
    launched.get("/flood?30000000")
    launched.get("/line?10000000")
    assert process.memory_info().rss - before < 1 << 20
    names = {"server.log", "server.log.1", "server.log.2", "server.log.3"}
    until(lambda: {p.name for p in launched.instance.glob("server.log*")} == names)
    sizes = {name: (launched.instance / name).stat().st_size for name in names}
    assert max(sizes.values()) <= launched.plan["log_max_bytes"]
    assert launched.status()["state"] == "ready"


def test_a_log_that_was_deleted_or_moved_is_begun_anew(launch: Launch, instance: Path) -> None:
    launched = launch(log_file=str(instance / "logs" / "server.log"))
    launched.until_state("ready")
    log = Path(launched.plan["log_file"])
    until(lambda: log.exists() and "fake host" in log.read_text())
    log.rename(log.with_suffix(".moved"))
    launched.get("/flood?1000")
    until(lambda: log.exists() and "flood" in log.read_text())
    log.unlink()
    log.parent.joinpath("server.moved").unlink()
    log.parent.rmdir()
    launched.get("/flood?1000")
    until(lambda: log.exists() and "flood" in log.read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_service(launch: Launch, instance: Path) -> None:
    instance.mkdir(parents=True)
    for name in ("journal.jsonl", ".state.json.new"):
        (instance / name).symlink_to("/dev/full")
    launched = launch(log_file="/dev/full", restart={"max_restarts": 9})
    launched.until_state("ready")
    launched.get("/flood?100000")
    launched.provoke("/kill")
    until(lambda: (launched.status()["server"] or {}).get("restarts") == 1)
    status = launched.until_state("ready")
    assert [e["reason"] for e in status["events"] if e["event"] == "log_trouble"] == ["No space left on device"]
    assert launched.stop() == 0


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


def test_fds_and_memory_do_not_grow_over_50_restarts(launch: Launch) -> None:
    launched = launch(restart={"max_restarts": 1000, "backoff_s": 0.0})
    launched.until_state("ready")
    process = psutil.Process(launched.process.pid)

    def crash(times: int) -> None:
        for _ in range(times):
            before = launched.status()["server"]["restarts"]
            os.kill(launched.status()["server"]["pid"], signal.SIGKILL)
            launched.until_restarts(before + 1)
            launched.until_state("ready")

    crash(5)
    fds, memory = process.num_fds(), process.memory_info().rss
    crash(50)
    until(lambda: process.num_fds() <= fds)  # the client of the last status may not be closed yet
    assert process.memory_info().rss - memory < 1 << 20
    assert process.num_threads() == 1


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


def test_imports_little_and_stays_small(launch: Launch) -> None:
    code = "import sys, mlx_launcher.supervisor.__main__; print(*sys.modules)"
    modules = set(
        subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2]).split()
    )
    assert not modules & {"click", "yaml", "mlx", "asyncio", "psutil", "pathlib", "argparse", "logging", "dataclasses"}
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
