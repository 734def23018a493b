"""Rows 56 and 57 of the list of faults: a configuration that was edited, then `restart`. The real command and server."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.launched import Crowd, Launcher, chat
from support.waiting import until

from mlx_launcher.demo import build_demo


class Configured:
    """A server started from a configuration file, which the test then edits."""

    def __init__(self, launcher: Launcher, directory: Path) -> None:
        self.launcher = launcher
        self.file = directory / "rc.json"
        self.block: dict[str, Any] = {
            "enabled": True,
            "port": launcher.port,
            "modelPath": str(build_demo(directory / "model")),
            "restart": {"maxRestarts": 1, "backoff": "10ms"},
        }
        self.edit()
        done = launcher.command("--config", str(self.file), "start")
        assert done.returncode == 0, done.stderr
        self.pid = launcher.server_pid()

    def edit(self, **changes: Any) -> None:
        self.file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": {**self.block, **changes}}}))

    def answers(self) -> None:
        assert chat(self.launcher.port, "Hi").status == 200


@pytest.fixture
def configured(launcher: Launcher, tmp_path: Path) -> Configured:
    return Configured(launcher, tmp_path)


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"port": "high"}, 4, "backends.mlx.port"),
        ({"restart": {"maxRestarts": "often"}}, 4, "backends.mlx.restart.maxRestarts"),
        ({"modelPath": "/nowhere/model"}, 1, "/nowhere/model"),
        ({"port": 1}, 1, "port"),
        (None, 4, "rc.json"),
    ],
)
def test_56_edited_to_something_bad_is_refused_before_anything_stops(
    configured: Configured, changes: dict[str, Any] | None, code: int, named: str
) -> None:
    if changes is None:
        configured.file.write_text('{"backends": {"mlx": {')
    else:
        configured.edit(**changes)
    done = configured.launcher.command("restart")
    assert done.returncode == code
    assert named in done.stderr
    assert "nothing was stopped" in done.stderr
    assert done.stderr.count("\n") == 1
    assert configured.launcher.server_pid() == configured.pid
    configured.answers()
    # Mended, it is taken without a start.
    configured.edit(stopTimeout="5s")
    done = configured.launcher.command("restart")
    assert done.returncode == 0, done.stderr
    assert "stopTimeout 30 → 5" in done.stdout
    assert configured.launcher.server_pid() != configured.pid


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"command": ["sh", "-c", "exit 3"]}, "exited with code 3"),
        ({"command": ["sh", "-c", "sleep 60"], "hangTimeout": "1s"}, "no progress for 1 s"),
        ({"env": {"PYTHONPATH": "broken"}}, "exited with code"),
    ],
)
def test_57_edited_to_something_that_never_gets_ready_brings_the_last_known_good_back(
    configured: Configured, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    if "env" in changes:
        (tmp_path / "mlx").mkdir()
        (tmp_path / "mlx" / "__init__.py").write_text("import os; os._exit(9)")
        changes = {"env": {"PYTHONPATH": str(tmp_path)}}
    configured.edit(**changes)
    with Crowd(lambda _: configured.answers(), clients=2) as crowd:
        done = configured.launcher.command("restart")
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 5)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "the last one that worked serves again" in done.stderr
    assert done.stderr.count("\n") == 1
    if "command" not in changes:  # which binds the port itself
        assert crowd.refused == []
    status = configured.launcher.status()
    assert (status["state"], status["backend"], status["listener"]) == ("ready", "mlx", "owned")
    assert status["server"]["pid"] != configured.pid
