"""`mlx-launch cluster size`."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from support.hub import Hub, serving
from support.modeldirs import model_directory

from mlx_launcher.cli import cluster_size, main
from mlx_launcher.cli.output import App, Result
from mlx_launcher.cli.screen import WIDTH
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.system.memory import Memory

QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
TENSORS = {"model.layers.0.mlp.down_proj.weight": ("F16", (8_000_000, 1000))}  # 16 GB


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_size, "model_memory", lambda: Memory(27 * 10**9, "75 % of 36.0 GB, the GPU's share"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model", QWEN, TENSORS)


def size(model: Path | str, *arguments: str) -> Result:
    found = cluster_size.command.main(["--model", str(model), *arguments], standalone_mode=False, obj=App([]))
    assert isinstance(found, Result)
    json.dumps(found.data)
    assert [line for line in found.lines[1:] if len(line) > WIDTH] == []
    return found


def test_as_it_is_typed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "size", "--model", str(model), "--json"])
    assert ended.value.code == 0
    envelope = json.loads(capsys.readouterr().out)
    assert (envelope["schema"], envelope["ok"], envelope["errors"]) == (1, True, [])
    assert list(envelope["data"]) == [
        *["model", "weight_bytes", "context", "conversations", "computed", "strategies", "impossible", "notes"]
    ]


def test_both_ways_to_spread_a_model(model: Path) -> None:
    found = size(model, "--context", "32768", "--conversations", "2")
    text = "\n".join(found.lines)
    assert "2 hosts, 2 conversations of 32,768 tokens\nComputed from" in text
    assert "at most" not in text
    assert found.data["computed"] is True
    tensor, pipeline = found.data["strategies"]
    assert (tensor["name"], pipeline["name"]) == ("tensor", "pipeline")
    assert list(tensor["hosts"][0]) == [
        *["rank", "first_layer", "layers", "weight_bytes", "kv_cache_bytes", "needed_bytes", "memory_bytes", "fits"]
    ]
    assert list(tensor["token"]) == [
        *["read_bytes", "link_bytes", "link_messages", "memory_s", "link_s", "tokens_per_s", "bound_by"]
    ]
    cache = 96 * 1024 * 32768  # of one conversation
    assert [host["kv_cache_bytes"] for host in tensor["hosts"]] == [cache, cache]
    assert [host["weight_bytes"] for host in pipeline["hosts"]] == [0, 16 * 10**9]
    assert [host["first_layer"] for host in pipeline["hosts"]] == [24, 0]
    assert [host["fits"] for host in pipeline["hosts"]] == ["yes", "yes"]


def test_the_memory_of_each_host_is_its_gpus_share(model: Path) -> None:
    hosts = size(model, "--memory", "24GB,16GB", "--strategy", "pipeline").data["strategies"][0]["hosts"]
    assert [(host["memory_bytes"], host["fits"]) for host in hosts] == [(18 * 10**9, "yes"), (12 * 10**9, "no")]
    (one,) = size(model, "--memory", "24GB", "--hosts", "4", "--strategy", "pipeline").data["strategies"]
    assert [host["memory_bytes"] for host in one["hosts"]] == [18 * 10**9] * 4


def test_tokens_a_second_want_rates(model: Path) -> None:
    found = size(model, "--bandwidth", "400", "--link", "5", "--latency", "1000", "--strategy", "tensor")
    token = found.data["strategies"][0]["token"]
    assert token["bound_by"] == "link"
    assert token["link_s"] > 0.192  # two sums in each of 48 layers, two messages each
    assert any(line.startswith("  at most ") for line in found.lines)
    assert "Without --latency the link's time is that of the bytes alone." in size(model, "--link", "5").lines


def test_one_host(model: Path) -> None:
    found = size(model, "--hosts", "1", "--bandwidth", "100")
    (only,) = found.data["strategies"]
    assert (only["name"], only["token"]["link_messages"], only["token"]["bound_by"]) == ("single", 0, "memory")
    assert found.data["impossible"] == {}
    assert found.data["model"]["source"] == "files"


def test_where_the_memory_is_not_known(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_size, "model_memory", lambda: None)
    assert size(model).data["strategies"][0]["hosts"][0]["fits"] is None


def test_what_cannot_be_spread_says_why(tmp_path: Path, model: Path) -> None:
    found = size(model, "--hosts", "3")
    assert "tensor: not possible, its 32 attention heads cannot be divided by 3" in found.lines
    with pytest.raises(LaunchError, match="its 32 attention heads cannot be divided by 3") as error:
        size(model, "--hosts", "3", "--strategy", "tensor")
    assert error.value.code == "strategy_unsupported"
    gemma = model_directory(tmp_path / "gemma", {**QWEN, "model_type": "gemma3_text"}, TENSORS)
    with pytest.raises(LaunchError, match=r"no tensor parallelism .* no pipeline"):
        size(gemma)


@pytest.mark.parametrize(
    "arguments", [["--memory", "much"], ["--memory", "1GB,2GB", "--hosts", "3"], ["--hosts", "0"], ["--bandwidth", "0"]]
)
def test_what_makes_no_sense_is_refused(model: Path, arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        size(model, *arguments)


def of_config(found: Result, weights: int) -> None:
    assert (found.data["model"]["source"], found.data["weight_bytes"]) == ("config", weights)
    assert "The weights are not here: they are taken as mlx-lm would pack them." in found.lines


def test_the_configuration_is_enough(tmp_path: Path) -> None:
    model = build_random(tmp_path / "model")
    weights = size(model).data["weight_bytes"]
    (model / "model.safetensors").unlink()
    of_config(size(model), weights)


def test_a_model_of_the_hub_need_not_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_random(tmp_path / "model")
    files = {name: (whole / name).read_bytes() for name in ("config.json", "model.safetensors")}
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    weights = size(whole).data["weight_bytes"]
    with serving(Hub("org/tiny", files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        of_config(size("org/tiny"), weights)
        assert hub.sent == 0  # of the weights
        with pytest.raises(LaunchError) as error:
            size("org/none")
        assert error.value.code == "model_not_found"
        del hub.files["config.json"]  # as of a repository with GGUF alone
        with pytest.raises(LaunchError, match=r"no config\.json") as error:
            size("org/tiny")
        assert error.value.code == "model_unsupported"
    assert not (tmp_path / ".cache" / "huggingface" / "hub").exists()


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"model_type": "no_such_thing"}, "architecture_unsupported"),
        ({"model_type": "llama", "x": 1}, "model_unsupported"),
    ],
)
def test_what_mlx_lm_cannot_build(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    model = model_directory(tmp_path / "model", config)
    (model / "model.safetensors").unlink()
    with pytest.raises(LaunchError) as error:
        size(model)
    assert error.value.code == code
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "option",
    [
        "--bandwidth=inf",
        "--bandwidth=nan",
        "--bandwidth=1e-320",
        "--link=nan",
        "--latency=1e400",
        "--context=" + "9" * 60,
    ],
)
def test_numbers_that_nothing_can_be_computed_from(
    option: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "size", "--model", str(model), "--json", option])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "usage"


def test_memory_in_bytes_is_memory(model: Path) -> None:
    assert size(model, "--memory=64000000000,128GB").data == size(model, "--memory=64GB,128GB").data
