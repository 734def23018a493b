"""`start --model org/name`: from the hub to an answer, through the real command, client and server."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import Hub, serving
from support.launched import Launcher, chat
from support.waiting import until

NAME = "org/tiny"


@pytest.fixture
def hub(random_model: Path) -> Iterator[Hub]:
    with serving(Hub(NAME, {file.name: file.read_bytes() for file in random_model.iterdir()})) as hub:
        yield hub


@pytest.fixture(autouse=True)
def environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command that a test runs: the test's own hub and home."""
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def test_a_model_from_the_hub_is_downloaded_served_and_listed(launcher: Launcher, hub: Hub) -> None:
    start = ("start", "--port", str(launcher.port), "--model", NAME)
    done = launcher.command(*start)
    assert done.returncode == 0, done.stderr
    assert f"downloading {NAME}" in done.stdout + done.stderr
    assert launcher.status()["model"]["id"] == NAME
    assert chat(launcher.port, "Hi", model=NAME, max_tokens=2).status == 200

    sent = hub.sent
    assert "running already" in launcher.command(*start).stdout
    assert hub.sent == sent
    listed = launcher.command("models").stdout
    assert f"{NAME} " in listed
    assert "mlx-textgen" in listed


def test_ctrl_c_while_it_downloads_starts_nothing_and_loses_nothing(
    launcher: Launcher, hub: Hub, tmp_path: Path
) -> None:
    hub.bytes_per_s = 500_000
    arguments = ["--state-dir", str(launcher.state_dir), "start", "--port", str(launcher.port), "--model", NAME]
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_launcher", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: hub.sent > 100_000, 30, "a download under way")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted" in err
    assert launcher.processes() == []
    assert len(list(tmp_path.rglob("*.partial"))) == 1
