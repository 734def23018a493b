"""The host on an NVIDIA GPU. Where there is none, or MLX does not use it, every test says so and is skipped."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.launched import Launcher, chat
from support.prompts import prose
from support.waiting import until

from mlx_launcher.demo import build_random
from mlx_launcher.doctor.check import Check
from mlx_launcher.doctor.python import device
from mlx_launcher.system.machine import machine

# The first time after an installation, CUDA's libraries take long to load, and kernels are compiled.
PROBE_S = 120.0
START_S = 300.0
PACK = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16")
"""


@functools.cache
def looked() -> Check:
    return device(machine(), {}, PROBE_S)


@pytest.fixture(autouse=True, scope="session")
def _on_a_gpu() -> None:
    if not machine().nvidia:
        pytest.skip("there is no NVIDIA GPU here (no driver is loaded)")
    if "computes on CUDA" not in looked().found:
        pytest.skip(f"{looked().found}; see docs/install.md, With an NVIDIA GPU")


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of 4 bits in bfloat16, as most are that people serve."""
    folder = tmp_path_factory.mktemp("packed")
    for family in ("llama", "qwen3_moe"):
        plain = build_random(folder / f"{family}-plain", family)
        command = [sys.executable, "-c", PACK, str(plain), str(folder / family)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
    return {family: folder / family for family in ("llama", "qwen3_moe")}


def start(launcher: Launcher, model: Path) -> None:
    done = launcher.command(
        *["start", "--port", str(launcher.port), "--model", str(model), "--timeout", str(int(START_S))],
        timeout_s=START_S + 30,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def holds_the_card(pid: int) -> bool:
    """Whether a process has the GPU's device file open: `/dev/nvidia0` or another number."""
    folder = Path(f"/proc/{pid}/fd")
    targets = [str(link.readlink()) for link in folder.iterdir() if link.is_symlink()]
    return any(target.removeprefix("/dev/nvidia").isdecimal() for target in targets)


def test_doctor_names_the_card(launcher: Launcher) -> None:
    assert looked().result == "ok"
    _, _, name = looked().found.partition("CUDA: ")
    assert name
    done = launcher.command("doctor", "--json")
    (found,) = [check for check in json.loads(done.stdout)["data"]["checks"] if check["name"] == "device"]
    assert found["result"] == "ok" or "did not compute one number within" in found["found"]


def test_a_host_proves_itself_and_answers_from_the_card(launcher: Launcher, random_model: Path) -> None:
    start(launcher, random_model)
    assert launcher.status()["state"] == "ready"
    assert holds_the_card(launcher.server_pid())
    reply = chat(launcher.port, "Tell me more.", max_tokens=12)
    assert reply.status == 200
    assert reply.json["usage"]["completion_tokens"] == 12
    assert reply.text


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_weights_are_multiplied(launcher: Launcher, packed: dict[str, Path], family: str) -> None:
    """A kernel that MLX lacks on CUDA shows in the proof: `start` then fails, and says which."""
    start(launcher, packed[family])
    # Both of mlx's ways through packed weights: for many tokens at once, and for one.
    reply = chat(launcher.port, prose(1, 600), max_tokens=12)
    assert reply.status == 200
    assert reply.json["usage"]["completion_tokens"] == 12


def test_the_kv_cache_is_there_after_a_restart(launcher: Launcher, random_model: Path) -> None:
    start(launcher, random_model)
    prompt = prose(2, 1500)
    first = chat(launcher.port, prompt, max_tokens=8)
    assert (first.status, first.cached) == (200, 0)
    # It is saved after it was answered, and told with the next beat.
    until(lambda: launcher.status()["kv_cache"]["entries"])
    assert launcher.command("stop", timeout_s=START_S).returncode == 0
    start(launcher, random_model)
    again = chat(launcher.port, prompt, max_tokens=8)
    # One token has to be run for the model to go on from.
    assert again.cached == first.json["usage"]["prompt_tokens"] - 1
    assert again.json["usage"]["completion_tokens"] == 8


def test_a_row_of_bench(launcher: Launcher, random_model: Path) -> None:
    done = launcher.command(
        *["--json", "bench", "--model", str(random_model), "--backends", "mlx"],
        *["--prompt-tokens", "300", "--turns", "1"],
        timeout_s=START_S,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["data"]["backends"]
    assert row["ok"]
    for name in ("first_request_s", "follow_up_s", "after_restart_s", "decode_tokens_per_s"):
        assert row[name]["median"] > 0
    assert row["cached_tokens"]["after_restart"]["low"] >= 300
