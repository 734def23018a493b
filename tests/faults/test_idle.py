"""Rows 63 and 68 of the list of faults, while nothing is loaded."""

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.launched import Launcher, chat
from support.supervised import Launched, running
from support.waiting import until

from mlx_launcher.demo import GREETING, build_demo
from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


def test_63_what_clients_asked_who_left_while_nothing_was_loaded_is_never_begun(
    launcher: Launcher, tmp_path: Path
) -> None:
    block = {"port": launcher.port, "modelPath": str(build_demo(tmp_path / "demo")), "idleTimeout": "2s"}
    file = tmp_path / "rc.json"
    file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": block}}))
    done = launcher.command("--config", str(file), "start")
    assert done.returncode == 0, done.stderr
    instance = str(launcher.state_dir / str(launcher.port))

    def status() -> dict[str, Any]:
        return dict(control.call(instance, {"do": "status"})["data"])

    until(lambda: status()["state"] == "idle")
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", launcher.port)
        connection.request("POST", "/v1/chat/completions", body)
        connection.close()
    assert chat(launcher.port, "Hi").text == GREETING
    until(lambda: status()["activity"]["requests"] >= 1 and status()["activity"]["in_flight"] == 0)
    assert status()["activity"]["requests"] == 1


def test_68_a_port_scanner_while_idle_causes_one_start(launch: Launch) -> None:
    launched = launch("--loading-s", "0.5", idle_timeout_s=1.0, idle=True)
    launched.until_state("idle")
    for _ in range(100):
        for host in launched.plan["hosts"]:
            socket.create_connection((host, launched.port), timeout=2).close()
    launched.until_state("ready")
    launched.until_state("idle")
    assert len(launched.server_pids()) == 1
    assert launched.get() == str(launched.server_pids()[1])
    assert launched.status()["server"]["restarts"] == 0


def test_01_killed_while_it_is_unloaded_is_no_crash(launch: Launch) -> None:
    launched = launch(idle_timeout_s=0.5)
    pid = launched.until_state("ready")["server"]["pid"]
    launched.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # beats that say that there is nothing to do
    os.kill(pid, signal.SIGSTOP)
    launched.process.send_signal(signal.SIGCONT)
    until(lambda: "drain" in launched.events())
    os.kill(pid, signal.SIGKILL)
    assert launched.until_state("idle")["last_error"] is None
    assert launched.server_pids() == [pid]
    assert launched.get() == str(launched.server_pids()[1])
    assert launched.status()["server"]["restarts"] == 0


def test_01_killed_while_it_is_woken_is_replaced_and_who_waits_is_answered(launch: Launch) -> None:
    launched = launch("--loading-s", "0.5", idle_timeout_s=0.5)
    launched.until_state("idle")
    with socket.create_connection(("127.0.0.1", launched.port), timeout=10) as client:
        client.sendall(b"GET /pid HTTP/1.1\r\n\r\n")
        until(lambda: launched.status()["phase"] == "loading")
        os.kill(launched.server_pids()[1], signal.SIGKILL)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    launched.until_state("idle")
    assert not any(running(pid) for pid in launched.server_pids())
