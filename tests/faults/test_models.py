"""Rows 40 to 45 of the list of faults: models that cannot be served, told before a process is started where that can be."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support.hosts import Host
from support.launched import Launcher
from support.modeldirs import model_directory, write_weights
from support.unprivileged import drop_capabilities
from support.waiting import free_port, until

from mlx_launcher.demo import build_random

TERABYTE = 10**12


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_random(tmp_path / "model")


def refused(launcher: Launcher, model: Path, *arguments: str, code: str) -> str:
    """What `start` says in its one line, having started nothing."""
    done = launcher.command("--json", "start", "--port", str(launcher.port), "--model", str(model), *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    (error,) = json.loads(done.stdout)["errors"]
    assert error["code"] == code
    assert str(model) in error["message"]
    assert error["hint"]
    assert launcher.processes() == []
    assert not (launcher.state_dir / str(launcher.port) / "journal.jsonl").exists()
    return f"{error['message']}. {error['hint']}"


def test_40_a_missing_model_directory_is_named_before_spawn(launcher: Launcher, tmp_path: Path) -> None:
    assert "no model" in refused(launcher, tmp_path / "nowhere", code="model_not_found")


def test_41_no_config_json_is_named_before_spawn(launcher: Launcher, model: Path) -> None:
    (model / "config.json").unlink()
    assert "no config.json" in refused(launcher, model, code="model_incomplete")


def test_42_torn_weights_are_named_before_spawn(launcher: Launcher, model: Path) -> None:
    cut_weights(model)
    assert "model.safetensors is torn" in refused(launcher, model, code="model_incomplete")


def test_43_no_tokenizer_is_named_before_spawn(launcher: Launcher, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(launcher, model, code="model_incomplete")


def test_43_a_torn_tokenizer_is_named_before_spawn(launcher: Launcher, model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:3000])
    assert "tokenizer.json is torn" in refused(launcher, model, code="model_incomplete")


def test_44_what_no_backend_can_serve_is_named_before_spawn(launcher: Launcher, tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", {"model_type": "bert"})
    assert "architecture bert of " in refused(launcher, model, code="architecture_unsupported")


def test_44_what_mlx_textgen_cannot_serve_is_named_at_start_with_what_can(launcher: Launcher, tmp_path: Path) -> None:
    model = model_directory(tmp_path / "model", {"model_type": "deepseek_v41"})
    why = "keeps its state in LayerCache, which mlx-textgen cannot serve. Serve it with --mode=mlx-legacy"
    # The fallback is tried; here it cannot load what is no more than a header.
    done = launcher.command("start", "--port", str(launcher.port), "--model", str(model))
    assert done.returncode == 1
    assert why in done.stdout + done.stderr
    launcher.command("stop")
    alone = tmp_path / "rc.json"
    alone.write_text(json.dumps({"backends": {"mlx": {"fallback": None, "port": launcher.port}}}))
    done = launcher.command(f"--config={alone}", "start", "--model", str(model))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert why in done.stderr


def test_45_a_model_larger_than_memory_is_refused_with_the_numbers_unless_forced(
    launcher: Launcher, tmp_path: Path
) -> None:
    model = build_random(tmp_path / "model")
    write_weights(model / "model.safetensors", {"model.embed_tokens.weight": ("F16", (TERABYTE // 2000, 1000))})
    assert (model / "model.safetensors").stat().st_blocks * 512 < 1_000_000  # a hole
    words = refused(launcher, model, code="model_too_large")
    assert "1000.0 GB of weights" in words
    assert "this machine has " in words
    assert "--force" in words
    forced = launcher.command("start", "--port", str(launcher.port), "--model", str(model), "--force", "--no-wait")
    assert forced.returncode == 0, forced.stderr


def cut_weights(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)


# What happens to a model after the command looked at it: the host finds it, and never says that it is ready.
LATER: dict[str, tuple[Callable[[Path], object], str]] = {
    "40": (shutil.rmtree, "no config.json"),
    "41": (lambda model: (model / "config.json").unlink(), "no config.json"),
    "42": (cut_weights, "model.safetensors is torn"),
    "43": (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer.json"),
    "44": (lambda model: (model / "config.json").write_text('{"model_type": "bert"}'), "bert"),
}


def _has_ended(host: Host) -> bool:
    return host.ready or host.fault is not None


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str | None]]:
    """The fault that the host reports for each row: all hosts at once, since each spends seconds on importing mlx."""
    root = tmp_path_factory.mktemp("hosts")
    models = {row: build_random(root / row) for row in LATER}
    for row, (breakage, _) in LATER.items():
        breakage(models[row])
    hosts = {row: Host(model, free_port(), root / "cache" / row) for row, model in models.items()}
    try:
        for row, host in hosts.items():
            until(partial(_has_ended, host), 90, f"the end of row {row}'s load")
        assert [row for row, host in hosts.items() if host.ready] == []
        yield {row: host.fault for row, host in hosts.items()}
    finally:
        for host in hosts.values():
            with suppress(OSError):
                host.process.kill()
            host.process.wait()
            host.channel.close()


@pytest.mark.parametrize("row", LATER)
def test_40_to_44_what_breaks_later_is_named_at_load(faults: dict[str, str | None], row: str) -> None:
    assert LATER[row][1] in (faults[row] or "")


def test_41_a_directory_that_may_not_be_read_is_named_and_listed(launcher: Launcher, tmp_path: Path) -> None:
    model = build_random(tmp_path / ".lmstudio" / "models" / "org" / "closed")
    launcher.state_dir.mkdir()
    for mode, words in ((0o000, "Permission denied"), (0o444, "Permission denied")):
        model.chmod(mode)
        for arguments in (["start", "--port", str(launcher.port), "--model", str(model)], ["models"]):
            done = subprocess.run(
                [sys.executable, "-m", "mlx_launcher", "--state-dir", str(launcher.state_dir), *arguments],
                env={**os.environ, "HOME": str(tmp_path)},
                preexec_fn=drop_capabilities,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == (1 if arguments[0] == "start" else 0), done.stderr
            assert words in done.stdout + done.stderr
    model.chmod(0o700)
