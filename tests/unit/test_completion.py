"""What the shell is told when somebody presses the tab key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("mlx-launch")


def completed(instruction: str, **environment: str) -> str:
    return subprocess.run(
        [PROGRAM],
        env={**os.environ, "_MLX_LAUNCH_COMPLETE": instruction, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    script = completed(f"{shell}_source")
    assert f"_MLX_LAUNCH_COMPLETE={shell}_complete" in script
    assert "mlx-launch" in script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mlx-launch st", {"start", "status", "stop"}),
        ("mlx-launch start --mo", {"--mode", "--model"}),
        ("mlx-launch config v", {"validate"}),
        ("mlx-launch pla", set()),
    ],
)
def test_what_is_offered(words: str, offered: set[str]) -> None:
    said = completed("bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert {line.partition(",")[2] for line in said.splitlines() if line} == offered
