"""`mlx-launch rollback` with the real servers: mlx-textgen, the legacy server, one address, and the file of `config init`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.launched import Crowd, Launcher, chat

from mlx_launcher.config import edit


class Configured(Launcher):
    """A launcher with a file as `config init` writes it, in a directory of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "state")
        self.file = root / ".anyclauderc.json"
        done = self("config", "init", "--port", str(self.port))
        assert done.returncode == 0, done.stderr

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        ours = ("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")
        plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return subprocess.run(
            [sys.executable, "-P", "-m", "mlx_launcher", "--state-dir", str(self.state_dir), *arguments],
            cwd=self.file.parent,
            env={**plain, "MLX_LAUNCH_TEST": str(self.state_dir)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def runs(self) -> str:
        """Which of our two servers answers at this moment."""
        return next(word for word in psutil.Process(self.server_pid()).cmdline() if word in ("textgen", "legacy"))

    def does(self, *arguments: str) -> str:
        done = self(*arguments)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Configured]:
    launcher = Configured(tmp_path)
    yield launcher
    launcher.clean_up()


def test_there_and_back_at_the_same_address_while_a_client_keeps_asking(configured: Configured) -> None:
    old = configured.file.read_bytes()
    configured.does("start")

    def ask(_: int) -> None:
        assert chat(configured.port, "Hello", max_tokens=4).status == 200

    with Crowd(ask, 2) as crowd:
        configured.does("rollback", "--yes")
        status = configured.status()
        assert (status["state"], status["backend"], status["configured_backend"]) == ("degraded", "mlx-legacy", "mlx")
        before, after = json.loads(old), json.loads(configured.file.read_bytes())
        assert after["backends"]["mlx"].pop("serverScript").endswith("/bin/mlx-server.py")
        before["backends"]["mlx"].pop("serverScript")
        assert after == before
        configured.does("rollback", "--undo", "--yes")
    assert (crowd.refused, crowd.errors) == ([], [])
    assert crowd.answered > 0
    assert configured.status()["state"] == "ready"
    assert configured.file.read_bytes() == old
    assert chat(configured.port, "Hello", model="demo").status == 200


def test_what_was_written_is_what_the_next_start_serves(configured: Configured) -> None:
    old = configured.file.read_bytes()
    configured.does("rollback", "--yes")
    configured.does("start")
    assert chat(configured.port, "Hello", model="demo", max_tokens=4).status == 200
    status = configured.status()
    assert (status["state"], status["rollback"], configured.runs()) == ("ready", None, "legacy")
    # The server runs from the file as it was rolled back: undoing restarts it from the file as it was before.
    configured.does("rollback", "--undo", "--yes")
    assert configured.file.read_bytes() == old
    assert (configured.status()["state"], configured.runs()) == ("ready", "textgen")
    assert [backup.read_bytes() for backup in edit.backups(configured.file)][-1] == old
    assert chat(configured.port, "Hello", model="demo", max_tokens=4).status == 200
