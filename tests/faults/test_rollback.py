"""Rows 60, 61 and 62 of FAULTS.md: a target that is no good, a kill in the middle, and somebody else at the same file."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.supervised import Launched, fake_host
from support.waiting import until

from mlx_launcher.demo import build_random

Launch = Callable[..., Launched]
_OURS = ("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")

# Kills itself before the Nth call that `edit` makes of the system, or in the middle of it where it writes.
KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from mlx_launcher.config import edit

class Killing:
    left = int(sys.argv[2])
    def __getattr__(self, name):
        found = getattr(os, name)
        if not callable(found) or isinstance(found, type) or name.startswith("path"):
            return found
        def call(*arguments, **named):
            Killing.left -= 1
            if Killing.left == 0:
                if name == "write":
                    os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return found(*arguments, **named)
        return call

source = edit.read(Path(sys.argv[1]))
edit.os = Killing()
edit.write(source, edit.set_value(source.text, ("backends", "mlx", "serverScript"), '"new"'))
"""


class World:
    """A real supervisor with fake servers, a file that it could have been started from, and the real command."""

    def __init__(self, root: Path, launch: Launch, port: int, **fallback: str) -> None:
        self.root = root
        self.port = port
        build_random(root / "model")
        self.launched = launch(
            model={"id": "model", "path": str(root / "model")},
            fallback={**fake_host(*fallback.get("arguments", "").split()), "name": fallback.get("name", "mlx-legacy")},
        )
        self.launched.until_state("ready")
        self.file = root / ".anyclauderc.json"

    def write(self, **more: Any) -> bytes:
        backends = {"mlx": {"port": self.port, "modelPath": "model", **more.pop("block", {})}, **more}
        self.file.write_text(json.dumps({"// mine": "é", "pythonVenv": sys.prefix, "backends": backends}, indent=3))
        return self.file.read_bytes()

    def rollback(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        plain = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        state_dir = str(self.launched.instance.parent)
        return subprocess.run(
            [sys.executable, "-P", "-m", "mlx_launcher", "--state-dir", state_dir, "rollback", *arguments],
            cwd=self.root,
            env={**plain, "HOME": str(self.root / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


BAD = {
    "missing": ("mine.sh", None, 0),
    "a directory": ("mine.sh/", None, 0),
    "not executable": ("mine.sh", "#!/bin/bash\nexec true\n", 0o644),
    "shell that does not parse": ("mine.sh", "#!/bin/bash\nif true; then\n", 0o755),
    "Python that does not parse": ("mine.py", "def broken(:\n", 0o755),
    "a secret": ("mine.sh", "#!/bin/bash\nexport API_KEY=0123456789abcdef0123456789abcdef\n", 0o755),
    "an import that is missing": ("mine.py", "import nowhere_to_be_found\n", 0o755),
}


@pytest.mark.parametrize("what", BAD)
def test_60_a_target_that_is_no_good_is_refused(what: str, tmp_path: Path, launch: Launch, port: int) -> None:
    name, text, mode = BAD[what]
    world = World(tmp_path, launch, port, name="mine")
    script = tmp_path / "scripts" / name
    script.parent.mkdir()
    if name.endswith("/"):
        script.mkdir()
    if text is not None:
        script.write_text(text)
        script.chmod(mode)
    old = world.write(block={"fallback": "mine"}, mine={"serverScript": f"./scripts/{name}"})
    for arguments in (("--check",), ("--yes",)):
        done = world.rollback(*arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "is refused" in done.stderr
        assert done.stderr.count("\n") == 1
        assert "0123456789abcdef" not in done.stdout + done.stderr
    assert world.file.read_bytes() == old
    assert list(tmp_path.glob(".*.bak")) == []
    status = world.launched.status()
    assert (status["state"], status["backend"], len(world.launched.server_pids())) == ("ready", "mlx", 1)


def test_60_a_target_that_does_not_prove_itself(tmp_path: Path, launch: Launch, port: int) -> None:
    world = World(tmp_path, launch, port, arguments="--fault torn")
    old = world.write()
    done = world.rollback("--yes")
    assert done.returncode == 1, done.stdout
    assert "mlx serves again; no file was changed" in done.stderr
    assert world.file.read_bytes() == old
    status = world.launched.until_state("ready")
    assert status["backend"] == "mlx"
    assert world.launched.get() == str(world.launched.server_pids()[-1])


def test_61_killed_anywhere_while_the_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rc.json"
    old = b'{"backends": {"mlx": {"serverScript": "old"}}}\n'
    new = old.replace(b"old", b"new")
    outcomes = []
    for calls in range(1, 100):
        file.write_bytes(old)
        done = subprocess.run(
            [sys.executable, "-P", "-c", KILLED_IN_THE_MIDDLE, str(file), str(calls)],
            capture_output=True,
            timeout=60,
            check=False,
        )
        outcomes.append(file.read_bytes())
        assert outcomes[-1] in (old, new)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(outcomes) > 10
    assert (outcomes[0], outcomes[-1]) == (old, new)
    # What the killed ones left is in nobody's way, and is not left for ever.
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def test_61_killed_while_the_server_switches(tmp_path: Path, launch: Launch, port: int) -> None:
    world = World(tmp_path, launch, port, arguments="--loading-s 1")
    old = world.write()
    command = threading.Thread(target=world.rollback, args=("--yes",))
    command.start()
    until(lambda: world.launched.status()["phase"] == "loading", what="the switch")
    for pid in _commands(tmp_path):
        os.kill(pid, signal.SIGKILL)
    command.join()
    assert world.file.read_bytes() == old
    assert world.launched.until_state("degraded")["backend"] == "mlx-legacy"
    # And the same again ends what was begun.
    done = world.rollback("--yes")
    assert done.returncode == 0, done.stderr
    assert b"mlx-server.py" in world.file.read_bytes()
    assert len(world.launched.server_pids()) == 2


def _commands(root: Path) -> list[int]:
    import psutil

    found = psutil.Process().children(recursive=True)
    return [child.pid for child in found if "rollback" in child.cmdline() and child.cwd() == str(root)]


def test_62_changed_by_someone_else_meanwhile(tmp_path: Path, launch: Launch, port: int) -> None:
    world = World(tmp_path, launch, port, arguments="--loading-s 1")
    theirs = world.write().replace(b"mine", b"theirs")

    def meanwhile() -> None:
        until(lambda: world.launched.status()["phase"] == "loading", what="the switch")
        world.file.write_bytes(theirs)

    somebody = threading.Thread(target=meanwhile)
    somebody.start()
    done = world.rollback("--yes")
    somebody.join()
    assert done.returncode == 1
    assert "mlx-legacy serves now" in done.stderr
    assert "changed by someone else meanwhile, and is not overwritten" in done.stderr
    assert world.file.read_bytes() == theirs
    assert list(tmp_path.glob(".*.bak")) == []
    assert world.launched.status()["state"] == "degraded"
    # Once it has been looked at, the same command writes it.
    assert world.rollback("--yes").returncode == 0
    assert world.rollback("--undo", "--yes").returncode == 0
    assert world.file.read_bytes() == theirs
    assert world.launched.until_state("ready")["backend"] == "mlx"
