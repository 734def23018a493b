"""`mlx-launch models`."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.modeldirs import model_directory

from mlx_launcher.cli import main
from mlx_launcher.cli import models as command
from mlx_launcher.models.places import hub_cache
from mlx_launcher.system.memory import Memory

QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "quantization": {"group_size": 64, "bits": 4},
}
LONG = "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit-dwq-v2"
KEYS = [
    "name",
    "path",
    "source",
    "bytes",
    "quantization",
    "context",
    "architecture",
    "cache",
    "backend",
    "fits",
    "problem",
]


class Models:
    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._capsys = capsys

    def put(self, name: str, config: dict[str, Any], gigabytes: float = 1.0) -> Path:
        tensors = {"model.norm.weight": ("F16", (int(gigabytes * 500_000), 1000))}
        return model_directory(self.home / ".lmstudio" / "models" / name, config, tensors)

    def __call__(self, *arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["models", *arguments])
        assert ended.value.code == 0
        out, err = self._capsys.readouterr()
        return out, err

    def json(self) -> list[dict[str, Any]]:
        envelope = json.loads(self("--json")[0])
        assert envelope["ok"]
        return list(envelope["data"]["models"])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Models:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(command, "model_memory", lambda: Memory(27 * 10**9, "75 % of 36.0 GB, the GPU's share"))
    return Models(tmp_path, capsys)


def test_no_models_says_where_it_looked_and_how_to_get_one(models: Models) -> None:
    out, err = models()
    assert err == ""
    for place in (".cache/huggingface/hub", ".lmstudio/models", ".cache/lm-studio/models"):
        assert str(models.home / place) in out
    assert "mlx-launch start --model mlx-community/" in out
    assert models.json() == []


def test_a_table_of_80_columns(models: Models) -> None:
    models.put(LONG, QWEN, 17.2)
    models.put("org/v41", {"model_type": "deepseek_v41", "max_position_embeddings": 131072}, 26)
    models.put("org/huge", {"model_type": "llama"}, 100)
    models.put("org/bert", {"model_type": "bert"}, 0.1)
    (models.home / ".lmstudio/models/x/bare").mkdir(parents=True)
    lines = models()[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["MODEL", "SIZE", "WEIGHTS", "CONTEXT", "SERVED", "BY", "FITS"]
    assert lines[1] == LONG  # whole: it is there to be copied
    assert lines[2].split() == ["17", "GB", "4", "bit", "262,144", "mlx-textgen", "yes"]
    assert lines[3].split() == ["org/bert", "100", "MB", "fp16", "?", "-", "yes"]
    assert lines[4].strip() == "not served: mlx-lm has no architecture bert"
    assert lines[5].split() == ["org/huge", "100", "GB", "fp16", "?", "mlx-textgen", "no"]
    assert lines[6].split() == ["org/v41", "26", "GB", "fp16", "131,072", "mlx-legacy", "tight"]
    assert lines[7:9] == ["x/bare", "  not served: has no config.json"]
    assert lines[-1] == "Memory for a model on this machine: 27 GB, 75 % of 36.0 GB, the GPU's share."


def test_json(models: Models) -> None:
    path = models.put(LONG, QWEN, 17.2)
    (models.put("org/torn", QWEN) / "tokenizer.json").unlink()
    good, torn = models.json()
    assert list(good) == KEYS
    assert good == {
        "name": LONG,
        "path": str(path),
        "source": "lmstudio",
        "bytes": 17_200_000_000,
        "quantization": {"bits": 4, "group_size": 64, "mode": "affine", "mixed": False},
        "context": 262144,
        "architecture": "qwen3_moe",
        "cache": "plain",
        "backend": "mlx-textgen",
        "fits": "yes",
        "problem": None,
    }
    assert list(torn) == KEYS
    assert torn["problem"] == "has no tokenizer.json"
    assert torn["fits"] is None


def test_the_hubs_cache_is_listed_too(models: Models) -> None:
    folder = hub_cache({"HOME": str(models.home)}) / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    model_directory(folder / "snapshots" / ("a" * 40), QWEN)
    (found,) = models.json()
    assert (found["name"], found["source"]) == ("org/name", "hub")


def test_names_that_would_break_a_terminal(models: Models) -> None:
    models.put("org/\x1b[31mred", QWEN)
    models.put("org/" + "長" * 60, QWEN)
    out = models()[0]
    assert "\x1b" not in out
    assert "org/?[31mred" in out


def test_unknown_memory(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "model_memory", lambda: None)
    models.put("org/a", QWEN)
    assert models()[0].splitlines()[1].endswith("?")
    assert models.json()[0]["fits"] is None
