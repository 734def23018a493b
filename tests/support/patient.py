"""An installation to be broken, examined and mended: a home, a configuration in it, a model, a state directory and a port."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.cli import main
from support.waiting import free_port

# What these say is about the machine and the environment that the tests run in; what they said of a healthy patient is not news.
_OF_THE_MACHINE = ("python", "packages", "device", "open files")


class Patient:
    """Healthy as it is made. `editor` puts FILE.good in the place of the FILE that it is to edit."""

    def __init__(self, root: Path, model: Path) -> None:
        self.home = root / "home"
        self.home.mkdir(mode=0o700)
        self.model = self.home / "model"
        shutil.copytree(model, self.model)
        self.state_dir = self.home / ".anyclaude" / "mlx-launch"
        self.port = free_port()
        self.instance = self.state_dir / str(self.port)
        self.instance.mkdir(parents=True, mode=0o700)
        self.state_dir.chmod(0o700)
        self.file = self.home / ".anyclauderc.json"
        self.configure()
        editor = root / "editor"
        editor.write_text('#!/bin/sh\nexec cp "$1.good" "$1"\n')
        editor.chmod(0o755)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {
            name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ
        }
        self.environment = {**kept, "HOME": str(self.home), "PATH": path, "EDITOR": str(editor)}
        self.usual: list[dict[str, Any]] = []

    def configure(self, top: dict[str, Any] | None = None, **block: Any) -> None:
        """Writes the configuration; what is not said is as in health."""
        mlx = {"port": self.port, "modelPath": str(self.model), **block}
        self.file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": mlx}, **(top or {})}))

    def misconfigure(self, top: dict[str, Any] | None = None, **block: Any) -> None:
        """The same, so that the editor can bring back what was there."""
        shutil.copy(self.file, f"{self.file}.good")
        self.configure(top, **block)

    def run(self, command: str, preexec: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
        """A command as it is pasted into a shell."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=preexec,
        )

    def findings(self, command: str = "mlx-launch doctor --json", preexec: Callable[[], None] | None = None) -> Any:
        """What the real command finds that is neither well nor usual here."""
        done = self.run(command, preexec)
        return self._news(done.stdout, done.returncode, done.stderr)

    def findings_here(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
        """The same in this process, which has imported everything."""
        for name in set(os.environ) - set(self.environment):
            if name != "PYTEST_CURRENT_TEST":
                monkeypatch.delenv(name)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(self.home)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json", *options])
        out, err = capsys.readouterr()
        return self._news(out, int(ended.value.code or 0), err)

    def _news(self, out: str, code: int, err: str) -> list[dict[str, Any]]:
        assert "Traceback" not in err
        checks = json.loads(out)["data"]["checks"]
        bad = [check for check in checks if check["result"] in ("warning", "failed")]
        assert code == (1 if any(check["result"] == "failed" for check in bad) else 0), err
        return [check for check in bad if check not in self.usual]

    def get_used_to(self) -> None:
        """Takes what is found now as what this machine is like; it must be about nothing else."""
        self.usual = self.findings()
        strange = [check for check in self.usual if check["name"] not in _OF_THE_MACHINE]
        assert strange == []
