"""anyclaude's `serverScript` contract (its commit 8366a02): its exact command lines, and every way in which it goes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.launched import ROOT, Launcher, chat, processes_naming
from support.waiting import until

from mlx_launcher.demo import GREETING, build_demo

SCRIPTS = ROOT / "scripts"
STARTED = "Application startup complete"

# Stands for anyclaude: starts the command as Node does, and reads its output.
CALLER = """
import socket, subprocess, sys
ours, theirs = socket.socketpair()
pipes = {"stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": subprocess.PIPE}
subprocess.Popen(["bash", "-c", sys.argv[1]], start_new_session=True, **pipes)
theirs.close()
with open(sys.argv[2], "ab", buffering=0) as log:
    while data := ours.recv(65536):
        log.write(data)
"""


class AnyClaude:
    """A caller in a process of its own, so that it can be killed."""

    def __init__(self, launcher: Launcher, model: Path, script: str) -> None:
        self.log = launcher.state_dir.parent / "anyclaude.log"
        path = SCRIPTS / script
        if script.endswith(".sh"):
            command = f'bash {path} "{model}" {launcher.port} "{self.log}" 2>&1'
        else:
            activate = Path(sys.prefix) / "bin" / "activate"
            command = (
                f'source {activate} && PYTHONUNBUFFERED=1 python3 {path} --model "{model}" --port {launcher.port} 2>&1'
            )
        environment = {
            **os.environ,
            "MLX_LAUNCH_STATE_DIR": str(launcher.state_dir),
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        home = launcher.state_dir.parent / "work"
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALLER, command, str(self.log)], env=environment, cwd=home
        )

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until_started(self) -> None:
        until(
            lambda: STARTED in self.said() or self.process.poll() is not None, 60, "the line that anyclaude waits for"
        )
        assert STARTED in self.said()

    def spawned(self) -> int:
        """The process group that anyclaude ends."""
        (child,) = psutil.Process(self.process.pid).children()
        return int(child.pid)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("models") / "with a space" / "demo")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()


@pytest.fixture
def anyclaude(launcher: Launcher, model: Path) -> Iterator[Callable[..., AnyClaude]]:
    all_of_them: list[AnyClaude] = []

    def call(script: str = "mlx-textgen-server.sh") -> AnyClaude:
        all_of_them.append(AnyClaude(launcher, model, script))
        return all_of_them[-1]

    yield call
    for caller in all_of_them:
        caller.process.kill()
        caller.process.wait()


def nothing_is_left(launcher: Launcher) -> bool:
    return processes_naming(str(launcher.state_dir)) == []


@pytest.mark.parametrize("script", ["mlx-textgen-server.sh", "mlx-textgen-server.py", "mlx-server.py"])
def test_it_serves_and_a_killed_anyclaude_leaves_nothing(
    launcher: Launcher, anyclaude: Callable[..., AnyClaude], script: str
) -> None:
    caller = anyclaude(script)
    caller.until_started()
    assert chat(launcher.port, "Hi").text == GREETING
    assert caller.said().count(STARTED) == 1
    assert launcher.status()["backend"] == ("mlx-legacy" if script == "mlx-server.py" else "mlx")
    caller.process.kill()
    caller.process.wait()
    until(lambda: nothing_is_left(launcher), 15, "the end of all processes")


def test_sigterm_to_the_group_is_an_orderly_end(launcher: Launcher, anyclaude: Callable[..., AnyClaude]) -> None:
    caller = anyclaude()
    caller.until_started()
    os.killpg(caller.spawned(), signal.SIGTERM)
    caller.process.wait(30)
    until(lambda: nothing_is_left(launcher), 15, "the end of all processes")
    assert "stopped" in caller.said()


def test_anyclaude_killed_while_the_server_starts(launcher: Launcher, anyclaude: Callable[..., AnyClaude]) -> None:
    caller = anyclaude()
    until(lambda: "importing" in caller.said(), 30)
    caller.process.kill()
    caller.process.wait()
    until(lambda: nothing_is_left(launcher), 15, "the end of all processes")


def test_a_hang_up_of_the_output_alone_is_enough(launcher: Launcher, model: Path) -> None:
    ours, theirs = socket.socketpair()
    command = f'bash {SCRIPTS / "mlx-textgen-server.sh"} "{model}" {launcher.port} /dev/null 2>&1; true'
    environment = {**os.environ, "MLX_LAUNCH_STATE_DIR": str(launcher.state_dir), "VIRTUAL_ENV": sys.prefix}
    bash = subprocess.Popen(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=theirs.fileno(),
        env=environment,
        start_new_session=True,
    )
    theirs.close()
    said = bytearray()
    reading = threading.Thread(target=lambda: _read(ours, said), daemon=True)
    reading.start()
    until(lambda: STARTED.encode() in said, 60)
    # bash lives on, as the parent of the script: only the output tells.
    assert bash.poll() is None
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
    assert bash.wait(20) == 0
    until(lambda: nothing_is_left(launcher), 15, "the end of all processes")


def _read(sock: socket.socket, into: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := sock.recv(65536):
            into += data


def test_a_server_that_runs_already_is_joined_and_outlives_its_caller(
    launcher: Launcher, anyclaude: Callable[..., AnyClaude]
) -> None:
    launcher.start("--demo")
    server = launcher.server_pid()
    caller = anyclaude()
    caller.until_started()
    assert "runs on port" in caller.said()
    assert "another model than asked for" in caller.said()
    joined = caller.spawned()
    caller.process.kill()
    caller.process.wait()
    until(lambda: joined not in {process.pid for process in launcher.processes()}, 15, "the end of the script")
    assert launcher.server_pid() == server
    assert chat(launcher.port, "Hi").text == GREETING


def test_a_model_that_fails_is_said_where_anyclaude_shows_it(
    launcher: Launcher, anyclaude: Callable[..., AnyClaude], model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    caller = AnyClaude(launcher, broken, "mlx-textgen-server.sh")
    caller.process.wait(30)
    assert str(broken) in caller.said()
    assert "config.json" in caller.said()
    assert "Traceback" not in caller.said()


def test_it_says_how_it_is_called(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / "mlx-textgen-server.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "MODEL PORT" in done.stderr
