"""Says so when mlx-textgen no longer has a defect that we correct: then the correction is to be taken out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_launcher.demo import build_random

PROBE = Path(__file__).with_name("upstream_probe.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("upstream")
    model = build_random(scratch / "model")
    done = subprocess.run(
        [sys.executable, str(PROBE), str(model), str(scratch)],
        env={**os.environ, "HOME": str(scratch), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "home": str(scratch), "model_bytes": sum(f.stat().st_size for f in model.glob("*.safetensors"))}


def test_generation_works_only_on_the_thread_that_imported(facts: dict[str, Any]) -> None:
    assert "no Stream" in (facts["generates_on_another_thread"] or ""), (
        "engine.py need not import on its own thread any more"
    )


def test_the_cache_directory_is_one_for_the_user(facts: dict[str, Any]) -> None:
    assert facts["cache_directory"].startswith(f"{facts['home']}/.cache/mlx_textgen")


def test_a_load_reads_all_weights_before_it_returns(facts: dict[str, Any]) -> None:
    assert facts["bytes_loaded_by_the_constructor"] > 0.9 * facts["model_bytes"]


def test_a_model_with_a_vision_part_is_loaded_with_the_vision_stack(facts: dict[str, Any]) -> None:
    assert facts["imports_vision_stack"]


@pytest.mark.skipif(mx.metal.is_available(), reason="the missing key is there on Metal")
def test_its_wired_limit_fails_without_metal(facts: dict[str, Any]) -> None:
    assert "KeyError" in (facts["wired_limit"] or "")


def test_streamed_automatic_tool_calls_never_fire(facts: dict[str, Any]) -> None:
    assert facts["streamed_auto_compares_a_list"]


def test_a_torn_index_breaks_it(facts: dict[str, Any]) -> None:
    assert "JSONDecodeError" in (facts["torn_index"] or "")


def test_a_missing_entry_breaks_it(facts: dict[str, Any]) -> None:
    assert facts["missing_entry"]


def test_a_full_disk_leaves_a_torn_entry(facts: dict[str, Any]) -> None:
    assert facts["bytes_left_by_a_full_disk"] is not None


def test_it_patches_the_rotating_cache(facts: dict[str, Any]) -> None:
    assert facts["patches_rotating_cache"]


def test_a_logit_bias_breaks_it(facts: dict[str, Any]) -> None:
    assert "logit_key" in (facts["logit_bias"] or "")


def test_log_probabilities_are_of_what_the_temperature_left(facts: dict[str, Any]) -> None:
    # Of the logits 1 and 2 it is -0.31.
    assert facts["logprob_of_a_likely_token"] == 0.0
