"""Loading on demand and the hot standby with the real command, supervisor and servers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.launched import Launcher, chat
from support.supervised import running
from support.waiting import until

from mlx_launcher.supervisor import control

EIGHT = 8


class Served:
    """A launcher with a configuration file of one backend."""

    def __init__(self, launcher: Launcher, file: Path, model: Path, backend: str, **block: Any) -> None:
        self.launcher, self.port = launcher, launcher.port
        self.file = file
        self._instance = str(launcher.state_dir / str(launcher.port))
        block = {"port": self.port, "modelPath": str(model), "fallback": None, **block}
        file.write_text(json.dumps({"backend": backend, "backends": {backend: block}}))

    def start(self) -> dict[str, Any]:
        done = self.launcher.command("--config", str(self.file), "start")
        assert done.returncode == 0, done.stderr
        return self.status()

    def status(self) -> dict[str, Any]:
        return dict(control.call(self._instance, {"do": "status"})["data"])

    def until_state(self, state: str) -> dict[str, Any]:
        until(lambda: self.status()["state"] == state, 60, f"state {state}")
        return self.status()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = Path(self._instance, "journal.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == name]

    def ask(self) -> str:
        return chat(self.port, "Hello", max_tokens=4).text


@pytest.fixture
def file(launcher: Launcher, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "rc.json"
    launcher.clean_up()


@pytest.mark.parametrize("backend", ["mlx", "mlx-legacy"])
def test_idle_and_back_with_eight_clients_at_once(
    launcher: Launcher, file: Path, random_model: Path, backend: str
) -> None:
    served = Served(launcher, file, random_model, backend, idleTimeout="3s")
    served.start()
    expected = served.ask()
    status = served.until_state("idle")
    assert (status["server"], len(launcher.processes())) == (None, 1)
    screen = launcher.command("status").stdout
    assert "idle" in screen
    assert "the next request starts it, which took" in screen
    again = launcher.command("--config", str(file), "start")
    assert (again.returncode, "It was running already." in again.stdout) == (0, True)
    assert served.status()["state"] == "idle"
    with ThreadPoolExecutor(EIGHT) as clients:
        answers = list(clients.map(lambda _: served.ask(), range(EIGHT)))
    assert answers == [expected] * EIGHT
    assert len(served.events("spawn")) == 2
    assert served.status()["server"]["restarts"] == 0


@pytest.mark.parametrize("backend", ["mlx", "mlx-legacy"])
def test_a_crash_is_answered_by_the_standby(launcher: Launcher, file: Path, random_model: Path, backend: str) -> None:
    served = Served(launcher, file, random_model, backend, standby=True)
    server = served.start()["server"]["pid"]
    expected = served.ask()

    def has_imported() -> int:
        """The standby that does nothing any more, so that it has nothing left to import."""
        seen = served.status()["standby"]
        if seen is None or not seen["rss_bytes"] or seen["pid"] == server:
            return 0
        worked = sum(psutil.Process(seen["pid"]).cpu_times()[:2])
        return int(seen["pid"]) if worked > 0.5 and _rests(seen["pid"]) else 0

    waiting = until(has_imported, 60, "a standby that waits")
    os.kill(server, signal.SIGKILL)
    assert served.ask() == expected
    assert served.status()["server"]["pid"] == waiting
    starts = {line["server"]: line["took_s"] for line in served.events("ready")}
    assert starts[waiting] < starts[server]
    until(lambda: served.status()["standby"], 60)
    assert "takes over after a crash" in launcher.command("status").stdout
    launcher.command("stop")
    assert launcher.processes() == []


def _rests(pid: int) -> bool:
    process = psutil.Process(pid)
    process.cpu_percent()
    return process.cpu_percent(0.5) < 10


def test_a_service_loads_nothing_before_it_is_asked_for(launcher: Launcher, file: Path, random_model: Path) -> None:
    served = Served(launcher, file, random_model, "mlx", idleTimeout="1h")
    command = [sys.executable, "-m", "mlx_launcher", "--state-dir", str(launcher.state_dir), "--config", str(file)]
    environment = {**os.environ, "MLX_LAUNCH_TEST": str(launcher.state_dir)}
    with subprocess.Popen(
        [*command, "run", "--service"], stdout=subprocess.PIPE, text=True, env=environment
    ) as service:
        assert service.stdout is not None
        assert next(line for line in service.stdout if line.startswith("idle: ")).startswith("idle: nothing is loaded")
        status = served.status()
        assert (status["state"], status["server"], status["supervisor"]["pid"]) == ("idle", None, service.pid)
        assert served.ask()
        server = served.until_state("ready")["server"]["pid"]
        service.send_signal(signal.SIGTERM)
        service.stdout.read()
        assert service.wait(30) == 0
    assert not running(server)


def test_a_service_is_not_for_a_caller(launcher: Launcher) -> None:
    done = launcher.command("run", "--demo", "--service", "--with-caller")
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)
