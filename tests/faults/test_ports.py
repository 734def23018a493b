"""Rows 38, 39, 67 and 68 of the list of faults: whose port it is."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launched import Launcher
from support.supervised import Launched
from support.unprivileged import drop_capabilities
from support.waiting import until

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor import listener

Launch = Callable[..., Launched]

STRANGER = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
sock = socket.socket(family); sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind((sys.argv[1], int(sys.argv[2]))); sock.listen(); print("there", flush=True); time.sleep(60)
"""


def stranger_on(address: str, port: int) -> "subprocess.Popen[bytes]":
    stranger = subprocess.Popen([sys.executable, "-c", STRANGER, address, str(port)], stdout=subprocess.PIPE)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == b"there\n"
    return stranger


def start(launcher: Launcher, *arguments: str, **popen: Any) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "mlx_launcher", f"--state-dir={launcher.state_dir}", "--no-config", "start", "--demo"]
    environment = {**os.environ, "MLX_LAUNCH_TEST": str(launcher.state_dir), "MLX_API_KEY": "k"}
    return subprocess.run([*argv, *arguments], capture_output=True, text=True, timeout=60, env=environment, **popen)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_38_port_taken_is_exit_5_with_name_pid_and_command_line(launcher: Launcher, address: str) -> None:
    with stranger_on(address, launcher.port) as stranger:
        done = start(launcher, f"--port={launcher.port}")
        stranger.kill()
    assert done.returncode == 5
    assert f"port {launcher.port} on {address} is taken by" in done.stderr
    assert f"(pid {stranger.pid})" in done.stderr
    assert "python" in done.stderr
    assert "import socket" in done.stderr  # its command line
    assert "--port" in done.stderr  # what to do
    assert done.stderr.count("\n") == 1
    until(lambda: launcher.processes() == [], 5, "the end of all processes")


@pytest.mark.parametrize("address", ["::1", "0.0.0.0", "::"])
def test_67_a_stranger_on_the_other_loopback_or_a_wildcard_is_named(launch: Launch, port: int, address: str) -> None:
    with stranger_on(address, port) as stranger:
        launched = launch()
        stranger.kill()
    assert launched.report is not None
    error = launched.report["error"]
    assert (launched.report["ok"], launched.report["exit"], error["code"]) == (False, 5, "port_in_use")
    assert f"(pid {stranger.pid})" in error["message"]
    assert "\n" not in error["message"]
    assert launched.process.wait(5) == 5


def first_port_for_all() -> int:
    file = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(file.read_text()) if file.exists() else 1024


@pytest.mark.skipif(first_port_for_all() < 900, reason="this machine lets everybody bind low ports")
def test_39_a_low_port_without_rights_is_exit_1_and_one_line(launcher: Launcher) -> None:
    done = start(launcher, "--port=899", preexec_fn=drop_capabilities)
    assert done.returncode == 1
    assert done.stderr == "mlx-launch: no permission for port 899 on 127.0.0.1. Choose a port above 1023.\n"


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7"])
def test_39_a_host_that_is_not_ours_is_exit_1_and_one_line(launcher: Launcher, host: str) -> None:
    done = start(launcher, f"--port={launcher.port}", f"--host={host}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"mlx-launch: {host} is not an address of this machine. ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "2001:db8::7"])
def test_39_the_host_is_named_and_what_to_do(port: int, host: str) -> None:
    with pytest.raises(LaunchError) as caught:
        listener.bind_all([host], port, print)
    assert (caught.value.code, caught.value.exit_code) == ("bind_failed", 1)
    assert host in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("when", ["while it starts", "while it serves"])
def test_68_a_port_scanner_starts_and_hurts_nothing(launch: Launch, when: str) -> None:
    launched = launch("--loading-s", "0.5")
    if when == "while it serves":
        launched.until_state("ready")
    for _ in range(100):
        for host in launched.plan["hosts"]:
            socket.create_connection((host, launched.port), timeout=2).close()
    launched.until_state("ready")
    assert launched.get() == str(launched.server_pids()[0])
    assert len(launched.server_pids()) == 1
    assert json.dumps(launched.status()["server"]["last_exit"]) == "null"
