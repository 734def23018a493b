"""`mlx-launch service` with a service manager that is only pretended, but starts and ends what it is told to."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.waiting import free_port, until

from mlx_launcher.cli import main, service
from mlx_launcher.cli.instances import is_locked
from mlx_launcher.demo import build_demo
from mlx_launcher.service import programs
from mlx_launcher.service.launchd import Launchd
from mlx_launcher.service.manager import Manager
from mlx_launcher.service.systemd import Systemd

FAKE = Path(__file__).parents[1] / "fakes" / "service_manager.py"


class World:
    """A home, a state directory with the demo model, and a manager that is called like a real one."""

    def __init__(self, root: Path, manager: Manager, program: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = root / "home"
        self.manager = manager
        self.here = root / "manager"
        self.here.mkdir()
        self.port = free_port()
        self._capsys = capsys
        binary = root / "bin" / program
        binary.parent.mkdir()
        binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "{self.here}" {program} "$@"\n')
        binary.chmod(0o755)

    def run(self, *arguments: str) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--json"])
        answer = json.loads(self._capsys.readouterr().out)
        return int(ended.value.code or 0), answer["data"], answer["errors"]

    def done(self, *arguments: str) -> dict[str, Any]:
        code, data, errors = self.run(*arguments)
        assert code == 0, errors
        return data

    def install(self, *options: str) -> dict[str, Any]:
        return self.done("--no-config", "service", "install", "--demo", f"--port={self.port}", *options)

    def calls(self) -> list[str]:
        """What the manager was called with since the last time, but for questions."""
        file = self.here / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line for line in lines if not re.search(r" (show|print|print-disabled) ", line)]

    def supervisors(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "mlx_launcher.supervisor" in process.cmdline() and process.environ().get("HOME") == str(self.home):
                    found.append(process.pid)
        return found

    def clean_up(self) -> None:
        for pid in self.supervisors():
            psutil.Process(pid).terminate()
        until(lambda: not self.supervisors(), what="the end of the supervisors")

    def files(self) -> list[str]:
        """What lies at home beside the state and the cache."""
        return [str(path) for path in self.home.rglob("*") if path.is_file() and ".anyclaude" not in path.parts]


Make = Callable[[str], World]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Make]:
    worlds = []

    def world(program: str) -> World:
        home = tmp_path / "home"
        home.mkdir()
        for name in [name for name in os.environ if name.startswith(("MLX_", "LOCAL_", "VLLM_", "ANYCLAUDE_", "XDG_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.chdir(home)
        manager: Manager = Systemd(os.environ) if program == "systemctl" else Launchd(os.environ, os.getuid())
        monkeypatch.setattr(service, "manager_here", lambda _: manager)
        build_demo(home / ".anyclaude" / "mlx-launch" / "models" / "demo")
        worlds.append(World(tmp_path, manager, program, capsys))
        return worlds[-1]

    yield world
    for one in worlds:
        one.clean_up()


@pytest.mark.parametrize("program", ["systemctl", "launchctl"])
def test_installed_replaced_and_taken_away(program: str, make: Make) -> None:
    world = make(program)
    assert world.run("service", "status")[0] == 3
    wished = world.install("--dry-run")
    assert (wished["changed"], world.files(), world.calls()) == (False, [], [])

    data = world.install()
    file = Path(data["file"])
    assert (data["changed"], file.stat().st_mode & 0o777) == (True, 0o600)
    assert data["steps"] == wished["steps"]
    (first,) = world.supervisors()
    (seen,) = world.done("service", "status")["services"]
    assert (seen["running"], seen["pid"], seen["enabled"], seen["outdated"], seen["by_hand"]) == (
        True,
        first,
        True,
        None,
        None,
    )
    assert world.done("status")["service"] is True
    world.calls()

    # Once more: nothing is touched. A start with the same settings finds it.
    assert world.install()["changed"] is False
    assert world.done("--no-config", "start", "--demo", f"--port={world.port}", "--no-wait")["already_running"] is True
    assert (world.calls(), world.supervisors()) == ([], [first])

    # Over an older version: that is ended first, and there is no second one.
    file.write_text(file.read_text().replace("NOFILE=4096", "NOFILE=99").replace("4096<", "99<"))
    (seen,) = world.done("service", "status")["services"]
    assert "another version" in seen["outdated"]
    assert world.install()["changed"] is True
    (second,) = world.supervisors()
    assert second != first
    verbs = [call.split()[2 if program == "systemctl" else 1] for call in world.calls()]
    assert verbs[0] in ("stop", "bootout")
    assert verbs[1:] in (["daemon-reload", "enable", "restart"], ["enable", "bootstrap"])

    # Away, and nothing is left but the state.
    assert world.done("service", "uninstall", "--dry-run")["changed"] is False
    assert world.supervisors() == [second]
    assert world.done("service", "uninstall")["changed"] is True
    assert (world.supervisors(), world.files()) == ([], [])
    assert world.done("service", "uninstall")["steps"] == []
    assert list((world.home / ".anyclaude" / "mlx-launch").glob("*.log")) == []


def test_one_that_gave_up_says_why(make: Make) -> None:
    world = make("systemctl")
    world.install()
    world.done("stop", f"--port={world.port}")
    file = world.home / ".anyclaude" / "mlx-launch" / str(world.port) / "state.json"
    state = json.loads(file.read_text())
    state["status"].update(state="failed", last_error="the weights are torn")
    file.write_text(json.dumps(state))
    code, data, errors = world.run("service", "status")
    assert (code, errors[0]["code"], data["services"][0]["reason"]) == (3, "not_running", "the weights are torn")


def test_a_server_that_was_started_by_hand_is_in_the_way(make: Make) -> None:
    world = make("systemctl")
    world.done("--no-config", "start", "--demo", f"--port={world.port}", "--no-wait")
    code, _, errors = world.run("--no-config", "service", "install", "--demo", f"--port={world.port}")
    assert (code, errors[0]["code"]) == (1, "already_running")
    assert f"stop --port {world.port}" in errors[0]["hint"]
    assert world.files() == []


@pytest.mark.parametrize("verb", ["daemon-reload", "enable", "restart"])
def test_what_fails_is_taken_back(verb: str, make: Make) -> None:
    world = make("systemctl")
    (world.here / "refuses").write_text(verb)
    code, _, errors = world.run("--no-config", "service", "install", "--demo", f"--port={world.port}")
    assert (code, errors[0]["code"]) == (1, "service_failed")
    assert f"{verb}: refused; nothing of it was left" in errors[0]["message"]
    assert (world.files(), world.supervisors()) == ([], [])
    # Over one that ran, that one runs again.
    (world.here / "refuses").unlink()
    world.install()
    file = world.manager.file(world.port)
    file.write_text(older := file.read_text().replace("RestartSec=10", "RestartSec=11"))
    if verb == "restart":
        return  # then nothing can start the older one either
    (world.here / "refuses").write_text(verb)
    code, _, errors = world.run("--no-config", "service", "install", "--demo", f"--port={world.port}")
    assert "what was there before is there again" in errors[0]["message"]
    assert file.read_text() == older
    assert len(world.supervisors()) == 1


def test_without_a_manager(make: Make) -> None:
    world = make("systemctl")
    (world.here / "refuses").write_text("show")
    code, _, errors = world.run("--no-config", "service", "install", "--demo", f"--port={world.port}")
    assert (code, errors[0]["code"]) == (1, "no_service_manager")
    assert f"systemctl --user restart mlx-launch-{world.port}.service" in errors[0]["hint"]
    assert world.files() == []
    data = world.install("--no-start")
    assert world.files() == [data["file"]]
    assert world.calls() == []
    code, seen, _ = world.run("service", "status")
    assert (code, seen["services"][0]["enabled"], seen["services"][0]["running"]) == (3, None, False)
    world.done("service", "uninstall")
    assert world.files() == []


def test_a_start_that_would_be_refused_is_not_installed(make: Make) -> None:
    world = make("systemctl")
    model = world.home / "empty"
    model.mkdir()
    for options, exit_code in (([], 2), ([f"--model={model}"], 1), (["--demo", "--mode=bogus"], 4)):
        code, _, errors = world.run("--no-config", "service", "install", f"--port={world.port}", *options)
        assert code == exit_code, errors
    assert (world.files(), world.calls()) == ([], [])


def test_the_port_of_the_configuration_has_changed(make: Make) -> None:
    world = make("systemctl")
    config = world.home / ".anyclauderc.json"
    model = world.home / ".anyclaude" / "mlx-launch" / "models" / "demo"

    def configured(port: int) -> None:
        config.write_text(json.dumps({"backends": {"mlx": {"port": port, "modelPath": str(model)}}}))

    configured(world.port)
    world.done("service", "install")
    (first,) = world.supervisors()
    configured(another := free_port())
    data = world.done("service", "install")
    (second,) = world.supervisors()
    assert (data["port"], second != first) == (another, True)
    assert set(world.files()) == {
        str(config),
        str(world.manager.file(another)),
        str(world.manager.links(another)[0]),
    }


def test_a_key_is_never_written(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make("systemctl")
    monkeypatch.setenv("MLX_API_KEY", "planted-key")
    options = ["--no-config", "service", "install", "--demo", f"--port={world.port}", "--host=0.0.0.0"]
    code, _, errors = world.run(*options)
    assert (code, errors[0]["code"]) == (1, "key_in_environment")
    assert "planted-key" not in json.dumps(errors)
    assert world.files() == []
    # What systemd reads by itself may hold one, if nobody else can read it.
    key_file = Path(world.manager.key_file())
    key_file.parent.mkdir(parents=True)
    key_file.write_text("MLX_API_KEY=planted-key\n")
    key_file.chmod(0o644)
    assert world.run(*options)[2][0]["code"] == "key_file"
    key_file.chmod(0o600)
    text = world.done(*options[:1], "service", "print", *options[3:])["text"]
    assert f"EnvironmentFile=-{key_file}" in text
    assert "planted-key" not in text


@pytest.mark.parametrize("way", [["install", "--dry-run"], ["print"]])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--model=/nonexistent"], "model_not_found"),
        (["--demo", "--host=0.0.0.0"], "key_required"),
        (["--model=org/not-here-yet", "--host=0.0.0.0"], "key_required"),
        (["--model=org/not-here-yet"], None),
    ],
)
def test_what_install_would_refuse_is_refused_beforehand(
    make: Make, way: list[str], options: list[str], code: str | None
) -> None:
    world = make("systemctl")
    ended, _, errors = world.run("--no-config", "service", *way, f"--port={world.port}", *options)
    assert (ended == 0, [error["code"] for error in errors]) == (code is None, [code] if code else [])
    assert (world.files(), world.calls()) == ([], [])


def test_the_manager_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, name in (("linux", "systemd"), ("darwin", "launchd")):
        monkeypatch.setattr(sys, "platform", platform)
        assert programs.manager({"HOME": "/home/me"}).name == name


def test_what_the_doctor_says(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make("systemctl")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    file, instance = world.manager.file(world.port), world.home / ".anyclaude" / "mlx-launch" / str(world.port)
    link = world.manager.links(world.port)[0]

    def finding() -> dict[str, Any]:
        _, data, _ = world.run("--no-config", "doctor", "--demo", f"--port={world.port}")
        (found,) = [check for check in data["checks"] if check["name"] == "service"]
        return dict(found)

    def is_mended(words: str) -> None:
        found = finding()
        assert (found["result"], words in found["found"]) == ("warning", True), found
        done = subprocess.run(["bash", "-c", found["remedy"]], capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        assert finding()["result"] == "ok", finding()

    assert finding()["result"] == "skipped"
    world.install()
    assert finding()["result"] == "ok"
    file.write_text(file.read_text().replace("WatchdogSec=30", "WatchdogSec=60"))
    is_mended("another version, or changed by hand")
    link.unlink()
    is_mended("is not started at login")
    world.done("stop", f"--port={world.port}")
    is_mended("does not run")
    world.done("stop", f"--port={world.port}")
    world.done("--no-config", "start", "--demo", f"--port={world.port}", "--no-wait")
    is_mended("started by hand")
    file.write_text(file.read_text().replace(sys.executable, "/gone/python"))
    found = finding()
    assert (found["result"], "its interpreter is gone" in found["found"]) == ("failed", True)
    (world.here / "refuses").write_text("show")
    file.write_text(file.read_text().replace("/gone/python", sys.executable))
    assert finding()["result"] == "skipped"
    assert is_locked(instance)
