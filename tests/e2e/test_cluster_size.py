"""What `cluster size` computes against what the processes of a real model take: weights and cache to the byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import free_port

from mlx_launcher.demo import FAMILIES, build_random
from mlx_launcher.models import sizing, splitting
from mlx_launcher.models.architectures import Architecture, architecture
from mlx_launcher.models.directory import check, read_config
from mlx_launcher.models.facts import facts, read_tensors
from mlx_launcher.models.outline import outline

# mlx-lm takes room for 256 tokens at a time: of so many, all is used. The windows of the sliding families are 32.
TOKENS = 256
# What the allocator rounds up, and the few small arrays beside weights and cache (positions, masks).
ALLOCATED = 0.02
# MLX leaves a part of an array in the buffer of the whole where that wastes no more than this, in bytes: a part of a small
# matrix, the window or the state that is left of a short prompt.
WASTED = 16384

# One rank, or the whole model without the environment of one. Splits as mlx-lm's `sharded_load` does, which wants an index of
# files in addition.
MEASURE = """
import gc, json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
group = mx.distributed.init()

def arrays(tree):
    return [array for _, array in tree_flatten(tree) if isinstance(array, mx.array)]

def read(model, cache, tokens):
    mx.eval(model(mx.zeros((1, tokens), mx.int32), cache=cache), *arrays([layer.state for layer in cache]))

for path, strategy in json.load(sys.stdin):
    before = mx.get_active_memory()
    model, _ = load_model(Path(path), lazy=True)
    if strategy == "tensor":
        model.shard(group)
    elif strategy == "pipeline":
        model.model.pipeline(group)
    mx.eval(model.parameters())
    weights = sum(array.nbytes for array in arrays(model.parameters()))
    gc.collect()
    loaded = mx.get_active_memory() - before
    cache = make_prompt_cache(model)
    read(model, cache, int(sys.argv[1]) - 1)
    read(model, cache, 1)  # what is sliding drops what it kept of the prompt with the first token
    kept = sum(layer.nbytes for layer in cache)
    gc.collect()
    grown = mx.get_active_memory() - before - loaded
    print(json.dumps({"weights": weights, "cache": kept, "loaded": loaded, "grown": grown}), flush=True)
    del model, cache
    gc.collect()
"""

PACK = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=64, q_bits=4, dtype="float32")
"""


def measured(models: list[tuple[Path, str]], ranks: int, folder: Path) -> list[list[dict[str, int]]]:
    """For each rank, in the order of `models`: bytes of the weights and of the cache, and what the allocator gave for them."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(ranks)]))
    asked = folder / "models.json"
    asked.write_text(json.dumps([(str(path), strategy) for path, strategy in models]))
    processes = []
    for rank in range(ranks):
        member = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        with asked.open() as given:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", MEASURE, str(TOKENS)],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **member},
                )
            )
    try:
        said = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    return [[json.loads(line) for line in output.splitlines()] for output, _ in said]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: build_random(folder / family, family) for family in FAMILIES}


def shape(path: Path) -> tuple[sizing.Shape, Architecture | None]:
    config = read_config(path)
    loaded_by = architecture(config)
    return sizing.shape(config, read_tensors(path), loaded_by), loaded_by


def agrees(model: sizing.Shape, host: sizing.Host, found: dict[str, int], wasted: int = 0) -> None:
    bounded = sum(
        model.layers[index].window is not None or model.layers[index].state_bytes > 0 for index in host.layers
    )
    assert (found["weights"], found["cache"]) == (host.weight_bytes, host.cache_bytes)
    assert host.weight_bytes <= found["loaded"] <= host.weight_bytes * (1 + ALLOCATED) + wasted
    assert host.cache_bytes <= found["grown"] <= host.cache_bytes * (1 + ALLOCATED) + WASTED * bounded


def test_one_host_takes_what_is_computed(models: dict[str, Path], tmp_path: Path) -> None:
    (found,) = measured([(path, "single") for path in models.values()], 1, tmp_path)
    for path, taken in zip(models.values(), found, strict=True):
        model, _ = shape(path)
        assert model.weight_bytes == check(path)
        assert not model.uncounted
        agrees(model, sizing.size(model, "single", 1, TOKENS, 1).hosts[0], taken)
        growing = sum(layer.token_bytes for layer in model.layers if layer.window is None)
        assert growing == facts(path).kv_bytes_per_token


def test_two_hosts_take_what_is_computed(models: dict[str, Path], tmp_path: Path) -> None:
    """In two processes that mlx joins over loopback."""
    asked: list[tuple[Path, splitting.Strategy]] = []
    for path in models.values():
        asked += [(path, strategy) for strategy in splitting.strategies(read_config(path), 2)[0]]
    assert {strategy for _, strategy in asked} == {"tensor", "pipeline"}
    ranks = measured([(path, strategy) for path, strategy in asked], 2, tmp_path)
    for rank, found in enumerate(ranks):
        for (path, strategy), taken in zip(asked, found, strict=True):
            model, _ = shape(path)
            wasted = WASTED * len(read_tensors(path)) if strategy == "tensor" else 0
            agrees(model, sizing.size(model, strategy, 2, TOKENS, 1).hosts[rank], taken, wasted)


def test_a_configuration_alone_tells_the_weights(models: dict[str, Path]) -> None:
    for family in ("llama", "gpt_oss", "gemma3_text", "qwen3_next"):
        path = models[family]
        assert outline(read_config(path)) == read_tensors(path), family


def test_a_configuration_alone_tells_packed_weights(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "packed"
    subprocess.run(
        [sys.executable, "-c", PACK, str(models["qwen3_moe"]), str(path)],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = read_tensors(path)
    assert any(kind == "U32" for kind, _ in found.values())
    assert outline(read_config(path)) == found
