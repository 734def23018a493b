import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_launcher.demo import build_random
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.models.fingerprint import fingerprint
from mlx_launcher.models.safetensors import TornFileError, data_start, read_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def weights(model: Path) -> Path:
    return next(model.glob("*.safetensors"))


def test_a_whole_model_has_as_many_bytes_as_its_weights(model: Path) -> None:
    assert 0 < check(model) < weights(model).stat().st_size


def cut(model: Path) -> None:
    file = weights(model)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def garbage(model: Path) -> None:
    weights(model).write_bytes(struct.pack("<Q", 12) + b"not a header")


def missing_shard(model: Path) -> None:
    index = {"weight_map": {"a": weights(model).name, "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


BREAKAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda model: (model / "config.json").unlink(), "no config.json"),
    (lambda model: (model / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda model: (model / "config.json").write_text("{}"), "names no model_type"),
    (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda model: (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes()[:3000]), "torn"),
    (lambda model: (model / "tokenizer.json").write_bytes(b""), "torn"),
    (lambda model: (model / "tokenizer_config.json").write_text('{"a": '), "tokenizer_config.json cannot be read"),
    (lambda model: weights(model).unlink(), "no model*.safetensors"),
    (lambda model: weights(model).write_bytes(b""), "torn"),
    (cut, "torn"),
    (garbage, "torn"),
    (missing_shard, "lacks model-00002-of-00002.safetensors"),
    (lambda model: (model / "model.safetensors.index.json").write_text("[]"), "index.json cannot be read"),
    (lambda model: (model / "model.safetensors.index.json").write_text("[" * 100_000), "index.json cannot be read"),
    (lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'), "lacks 1"),
    (lambda model: (model / "model-2.safetensors").symlink_to("nowhere"), "model-2.safetensors"),
    (lambda model: (model / "model-2.safetensors").mkdir(), "model-2.safetensors"),
]


@pytest.mark.parametrize(("breakage", "words"), BREAKAGES)
def test_a_broken_model_is_named(model: Path, breakage: Callable[[Path], object], words: str) -> None:
    breakage(model)
    with pytest.raises(BrokenModelError) as caught:
        check(model)
    assert words in caught.value.reason
    assert str(model) in caught.value.reason


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": [0, 0]}}',
        b'{"a": {"data_offsets": [0, 0], "dtype": 1, "shape": []}}',
        b'{"a": {"data_offsets": [0, 0], "dtype": "F16", "shape": ["x"]}}',
        b'{"a": {"data_offsets": ["0", "0"], "dtype": "F16", "shape": [0]}}',
        b'{"a": {"data_offsets": [0, 0.0], "dtype": "F16", "shape": [0]}}',
        b'{"a": {"data_offsets": [1, 0], "dtype": "F16", "shape": [0]}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_header_of_another_shape_is_torn(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(TornFileError):
        read_header(file)


def test_a_fingerprint_is_of_the_content_not_of_the_name(model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    assert fingerprint(model) == fingerprint(moved)
    other = build_random(tmp_path / "other" / "model", seed=1)
    assert fingerprint(other) != fingerprint(model)
    (moved / "tokenizer_config.json").write_text("{}")
    assert fingerprint(moved) != fingerprint(model)


def test_a_fine_tune_of_any_one_tensor_has_another_fingerprint(model: Path, tmp_path: Path) -> None:
    file = weights(model)
    content, start, header = file.read_bytes(), data_start(file), read_header(file)
    found = {fingerprint(model)}
    for number, tensor in enumerate(header.values()):
        begin, end = (start + offset for offset in tensor["data_offsets"])
        tuned = Path(shutil.copytree(model, tmp_path / f"tuned {number}"))
        other = bytes(255 - byte for byte in content[begin:end])
        (tuned / file.name).write_bytes(content[:begin] + other + content[end:])
        found.add(fingerprint(tuned))
    assert len(found) == len(header) + 1
