import json
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.cli import main
from mlx_launcher.kvcache.files import Tensor
from mlx_launcher.kvcache.store import Limits, Store

LIMITS = Limits(10, 1, 1 << 40)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "state"


def folder(state: Path, name: str) -> Path:
    """The folder of a model whose fingerprint is `name`, again and again."""
    return state / "kvcache" / (name * 16)[:16]


def filled(state: Path, name: str, model: Path, entries: int = 2, size: int = 1000) -> Store:
    store = Store(folder(state, name), LIMITS)
    store.describe(model.name, model)
    for number in range(entries):
        store.add(None, [number] * 10, [Tensor("x", "U8", (size,), memoryview(bytes(size)))])
    return store


def run(state: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["--no-config", "--state-dir", str(state), "cache", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def listed(state: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    code, out, _ = run(state, capsys, "list", "--json")
    assert code == 0
    models: list[dict[str, Any]] = json.loads(out)["data"]["models"]
    return models


def test_list_shows_each_model_and_which_is_in_use(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(state, "a", tmp_path / "first").close()
    used = filled(state, "b", tmp_path / ("long" * 30), size=5000)
    models = {model["path"][-1]: model for model in listed(state, capsys)}
    assert (models["a"]["model"], models["a"]["files"], models["a"]["in_use"]) == ("first", 2, False)
    assert (models["b"]["bytes"] > 10_000, models["b"]["in_use"]) == (True, True)
    used.close()
    code, out, _ = run(state, capsys, "list")
    assert code == 0
    assert "first" in out
    assert max(map(len, out.splitlines()[:4])) <= 80


def test_nothing_kept_is_no_error(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, capsys, "list")[:2] == (0, f"Nothing is kept in {state / 'kvcache'}.\n")
    assert run(state, capsys, "verify")[0] == 0
    assert run(state, capsys, "clear")[:2] == (0, "Removed 0 B.\n")


def test_verify_names_what_is_damaged_and_changes_nothing(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(state, "a", tmp_path / "model").close()
    assert run(state, capsys, "verify")[:2] == (0, "All 2 files are whole.\n")
    bad = sorted(folder(state, "a").glob("*.safetensors"))[0]
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    code, out, err = run(state, capsys, "verify", "--json")
    answer = json.loads(out)
    assert (code, answer["errors"][0]["code"]) == (1, "cache_damaged")
    assert [entry["path"] for entry in answer["data"]["damaged"]] == [str(bad)]
    assert "1 of 2 files" in err
    assert bad.exists()


def test_what_a_server_is_writing_is_neither_counted_nor_damaged(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = filled(state, "a", tmp_path / "model")
    (used.directory / ".partial-1-half.safetensors").write_bytes(b"half")
    assert run(state, capsys, "verify")[:2] == (0, "All 2 files are whole.\n")
    assert listed(state, capsys)[0]["files"] == 2


def test_prune_removes_torn_files_gone_models_and_what_is_beyond_the_bound(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    store = filled(state, "a", model, entries=4)
    one = store.summary()["bytes"] // 4
    store.set_aside(store.lines()[0])
    store.close()
    filled(state, "b", tmp_path / "deleted").close()
    used = filled(state, "c", model)
    code, out, _ = run(state, capsys, "prune", "--max-bytes", str(used.summary()["bytes"] + 2 * one + 500))
    assert (code, "1 left alone" in out) == (0, True)
    left = {path.name[0]: len(list(path.glob("*.safetensors"))) for path in (state / "kvcache").iterdir()}
    assert left == {"a": 2, "c": 2}
    assert not (folder(state, "a") / "torn").exists()


def test_clear_asks_and_leaves_alone_what_a_server_uses(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(state, "a", tmp_path / "model").close()
    used = filled(state, "b", tmp_path / "model")
    code, _, err = run(state, capsys, "clear")
    assert (code, "--yes" in err) == (2, True)
    assert len(listed(state, capsys)) == 2
    assert run(state, capsys, "clear", "--yes")[0] == 0
    assert [model["path"][-1] for model in listed(state, capsys)] == ["b"]
    assert used.find([0] * 11)


def test_a_bound_that_is_none_is_a_usage_error(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(state, capsys, "prune", "--max-bytes", "much")
    assert (code, "--max-bytes: a size is wanted" in err) == (2, True)


def test_it_looks_where_the_configuration_says(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "elsewhere"
    filled(tmp_path, "a", tmp_path / "model").close()
    (tmp_path / "kvcache").rename(place)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"backends": {"mlx": {"model": "/m", "cache": {"dir": "elsewhere"}}}}))
    with pytest.raises(SystemExit):
        main(["--config", str(config), "--state-dir", str(state), "cache", "list", "--json"])
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["dir"], len(data["models"])) == (str(place), 1)


@pytest.mark.parametrize("command", ["list", "verify", "prune", "clear"])
def test_a_cache_that_cannot_be_looked_at_is_not_an_empty_one(
    command: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state.mkdir()
    (state / "kvcache").touch()
    code, out, _ = run(state, capsys, command, "--json")
    assert (code, json.loads(out)["errors"][0]["code"]) == (1, "cache_failed")


def test_a_directory_that_begins_with_a_tilde_and_is_no_home(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"backends": {"mlx": {"model": "/m", "cache": {"dir": "~nobody-of-that-name/x"}}}}))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "--state-dir", str(state), "cache", "list", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["data"]["dir"] == str(tmp_path / "~nobody-of-that-name" / "x")


def test_what_is_not_ours_is_neither_counted_nor_touched(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `cache.dir` names a folder that holds other things: a folder of models, or of photographs."""
    mine = filled(state, "a", tmp_path / "model")
    root = state / "kvcache"
    others = [
        root / "model" / "model.safetensors",
        root / "notes.txt",
        root / ("b" * 16) / "model.safetensors",  # no lock: it was not made here
        mine.directory / "model.safetensors",
        mine.directory / "thesis.txt",
    ]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    assert [model["files"] for model in listed(state, capsys)] == [2]
    mine.close()
    for command in (["verify"], ["prune", "--max-bytes", "0"], ["clear", "--yes"]):
        assert run(state, capsys, *command)[0] == 0
    assert all(file.read_text() == "mine" for file in others)
    assert sorted(path.name for path in mine.directory.iterdir()) == ["model.safetensors", "thesis.txt"]


def test_clear_asks_about_torn_files_too(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(state, "a", tmp_path / "model", entries=1)
    store.set_aside(store.lines()[0])
    store.close()
    assert run(state, capsys, "clear")[0] == 2
    assert run(state, capsys, "clear", "--yes")[0] == 0
    assert not store.directory.exists()


def test_a_link_in_the_state_directory_is_not_followed(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, "a", tmp_path / "model").close()
    state.mkdir()
    (state / "kvcache").symlink_to(tmp_path / "kvcache")
    code, _, err = run(state, capsys, "clear", "--yes")
    assert (code, "is a link" in err) == (1, True)
    assert folder(tmp_path, "a").exists()
