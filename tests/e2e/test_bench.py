"""`mlx-launch bench` as a user runs it: both backends, beside a server that runs, and whatever ends it."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from support.launched import Launcher, chat
from support.waiting import until

TIMES = ("first_request_s", "follow_up_s", "after_restart_s")


def bench(launcher: Launcher, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return launcher.command("--json", "bench", "--turns", "2", *arguments, timeout_s=110)


@contextlib.contextmanager
def begun(launcher: Launcher, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """One that is at its first request."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_launcher", "--state-dir", str(launcher.state_dir), "bench", *arguments],
        env={**os.environ, "MLX_LAUNCH_TEST": str(launcher.state_dir)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stderr
        until(functools.partial(says, process.stderr, "first request"))
        yield process


def says(stream: IO[str], text: str) -> bool:
    """Whether the next line has the text in it."""
    line = stream.readline()
    assert line, f"it ended and never said {text!r}"
    return text in line


def left(launcher: Launcher) -> list[Path]:
    return list(launcher.state_dir.glob("bench-*"))


def files(launcher: Launcher) -> dict[Path, int]:
    """Of its KV cache."""
    found = (launcher.state_dir / "kvcache").rglob("*")
    return {file: file.stat().st_mtime_ns for file in found if file.is_file()}


def test_both_backends_beside_a_server_that_stays_as_it_is(launcher: Launcher, random_model: Path) -> None:
    launcher.start("--model", str(random_model))
    chat(launcher.port, "It was a dark and stormy night. " * 20, max_tokens=1)
    # It is saved after it was answered, and told with the next beat.
    until(lambda: launcher.status()["kv_cache"]["entries"])
    before, cache = launcher.status(), files(launcher)
    done = bench(launcher, "--model", str(random_model), "--backends", "mlx,mlx-legacy", "--prompt-tokens", "300")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)["data"]
    assert data["model"] == {"id": str(random_model), "path": str(random_model)}
    assert (data["prompt_tokens"], data["turns"], data["shared_with"]) == (300, 2, [launcher.port])
    ours, legacy = data["backends"]
    assert (ours["name"], legacy["name"]) == ("mlx", "mlx-legacy")
    for row in (ours, legacy):
        assert (row["ok"], row["error"]) == (True, None)
        assert all(row[name]["median"] > 0 and len(row[name]["values"]) == 2 for name in TIMES)
        assert row["prompt_tokens"]["median"] == pytest.approx(300, rel=0.1)
        assert row["prefill_tokens_per_s"]["median"] > 0
        assert row["decode_tokens_per_s"]["median"] > 0
        # What the turn before held, or nearly; nothing of the first.
        assert row["cached_tokens"]["first"]["high"] < 50
        assert row["cached_tokens"]["follow_up"]["low"] >= 300
    assert ours["cached_tokens"]["after_restart"]["low"] >= 300
    assert legacy["cached_tokens"]["after_restart"]["high"] < 50
    assert ours["cache"]["files"] >= 2
    assert ours["cache"]["bytes"] > 100_000
    assert legacy["cache"] is None
    assert left(launcher) == []
    after = launcher.status()
    assert after["server"]["pid"] == before["server"]["pid"]
    assert (after["activity"]["requests"], after["kv_cache"]) == (before["activity"]["requests"], before["kv_cache"])
    assert files(launcher) == cache


def test_a_backend_that_fails_is_a_row_with_its_reason(launcher: Launcher, random_model: Path, tmp_path: Path) -> None:
    file = tmp_path / ".anyclauderc.json"
    blocks: dict[str, Any] = {
        "mlx": {"modelPath": str(random_model)},
        "mine": {"command": [sys.executable, "-c", "raise SystemExit('no such thing')"]},
    }
    file.write_text(json.dumps({"backend": "mlx", "backends": blocks}))
    done = launcher.command(
        f"--config={file}", "bench", "--backends", "mine,nobody,mlx", "--turns", "1", "--prompt-tokens", "150"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mlx-launch: 2 of 3 backends could not be measured; mine: ")
    shown = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in shown[:-2])  # the last two are the reasons
    assert [line.split()[-3:-1] for line in shown if line.startswith("cache files")] == [["failed", "failed"]]
    assert shown[-2].startswith("mine: its server failed: ")
    assert shown[-1].startswith("nobody: there is no backend")
    assert left(launcher) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_it_leaves_nothing(launcher: Launcher, random_model: Path, number: signal.Signals) -> None:
    with begun(launcher, "--model", str(random_model), "--prompt-tokens", "6000") as process:
        assert process.stderr
        process.send_signal(number)
        assert process.stderr.read().endswith("mlx-launch: interrupted.\n")
    assert process.returncode == 130
    assert launcher.processes() == []
    assert left(launcher) == []


def test_the_server_of_one_that_was_killed_as_it_began_goes_too(launcher: Launcher, random_model: Path) -> None:
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "mlx_launcher", "--state-dir", str(launcher.state_dir)],
            *["bench", "--model", str(random_model), "--backends", "mlx"],
        ],
        env={**os.environ, "MLX_LAUNCH_TEST": str(launcher.state_dir)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    with process:
        until(psutil.Process(process.pid).children, what="its supervisor")
        (supervisor,) = psutil.Process(process.pid).children()
        process.kill()
    assert psutil.wait_procs([supervisor], timeout=30)[1] == []


def test_what_a_killed_one_left_goes_with_the_next(launcher: Launcher) -> None:
    with begun(launcher, "--demo", "--backends", "mlx") as process:
        process.kill()
    until(lambda: launcher.processes() == [])
    assert len(left(launcher)) == 1
    done = bench(launcher, "--demo", "--backends", "mlx", "--prompt-tokens", "100")
    assert done.returncode == 0, done.stderr
    assert left(launcher) == []
