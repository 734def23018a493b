"""Which value wins, and where it came from."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.config.document import nothing, read
from mlx_launcher.config.layers import DEFAULTS, Flags, Settings, settle
from mlx_launcher.config.schema import Cluster
from mlx_launcher.config.show import MASK, rows
from mlx_launcher.errors import LaunchError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".anyclauderc.json"


def layered(file: Path, data: dict[str, Any], flags: Flags = Flags(), /, **environment: str) -> Settings:  # noqa: B008
    file.write_text(json.dumps(data))
    return settle(flags, environment, read(file))


def mlx(**block: Any) -> dict[str, Any]:
    return {"backends": {"mlx": block}}


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    settings = settle(Flags(), {}, nothing(str(tmp_path)))
    assert {key: settings[key] for key in DEFAULTS} == DEFAULTS
    assert {settings.origin(key) for key in DEFAULTS} == {"default"}
    assert (settings.block, settings.asked.origin) == ("mlx", "default")


def test_every_value_has_a_key_in_the_file() -> None:
    for key in DEFAULTS:
        assert key == "pythonVenv" or key.split(".")[0] in Cluster.model_fields


def test_file_environment_and_flags_in_that_order(file: Path) -> None:
    data = mlx(port=1001, apiKey="file", model="m-file", modelPath="/file")
    settings = layered(file, data)
    assert (settings["port"], settings.origin("port")) == (1001, f"{file} backends.mlx.port")
    environment = {"MLX_URL": "http://localhost:1002/v1", "MLX_API_KEY": "env", "MLX_MODEL": "m-env"}
    settings = layered(file, data, **environment)
    assert (settings["port"], settings.origin("port")) == (1002, "environment MLX_URL")
    assert (settings["apiKey"], settings["model"]) == ("env", "m-env")
    settings = layered(file, data, Flags(port=1003, host="::1", model="/flag"), **environment)
    assert (settings["port"], settings.origin("port")) == (1003, "flag --port")
    assert (settings["modelPath"], settings.origin("modelPath")) == ("/flag", "flag --model")
    assert settings.origin("host") == "flag --host"


def test_the_port_of_the_base_url(file: Path) -> None:
    settings = layered(file, mlx(baseUrl="http://localhost:8080/v1"))
    assert (settings["port"], settings.origin("port")) == (8080, f"{file} backends.mlx.baseUrl")


@pytest.mark.parametrize("prefix", ["MLX", "VLLM_MLX", "LOCAL"])
def test_older_and_newer_names_of_the_environment(prefix: str, file: Path) -> None:
    settings = layered(file, mlx(), **{f"{prefix}_URL": "http://127.0.0.1:5/v1", f"{prefix}_MODEL": "m"})
    assert (settings["port"], settings["model"]) == (5, "m")
    assert settings.origin("model") == f"environment {prefix}_MODEL"


def test_which_name_of_the_environment_goes_first(file: Path) -> None:
    both = {"MLX_MODEL": "mlx", "LOCAL_MODEL": "local"}
    assert layered(file, mlx(), **both)["model"] == "mlx"
    data = {"backend": "local", "backends": {"local": {"modelPath": "/m"}}}
    assert layered(file, data, **both)["model"] == "local"


def test_an_empty_variable_says_nothing(file: Path) -> None:
    assert layered(file, mlx(apiKey="file"), MLX_API_KEY="", ANYCLAUDE_MODE="")["apiKey"] == "file"


def test_a_url_of_the_environment_that_is_elsewhere(file: Path) -> None:
    with pytest.raises(LaunchError, match=r"environment MLX_URL: far.example is another machine") as caught:
        layered(file, mlx(), MLX_URL="http://far.example:1/v1")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("model", "model_path", "environment", "key"),
    [
        ("name", "/path", {}, "modelPath"),
        ("/path", None, {}, "model"),
        ("org/name", None, {}, "model"),
        ("name", None, {}, None),
        ("here", None, {}, "model"),  # a directory of that name is there
        ("name", "/path", {"MLX_MODEL": "/newer"}, "model"),
        ("name", "/path", {"MLX_MODEL": "org/name"}, "modelPath"),
        ("name", "/path", {"MLX_MODEL": "/newer", "MLX_MODEL_PATH": "/newest"}, "modelPath"),
        (None, None, {"MLX_MODEL": "org/name"}, "model"),
    ],
)
def test_which_key_names_the_model_on_disk(
    model: str | None, model_path: str | None, environment: dict[str, str], key: str | None, file: Path
) -> None:
    (file.parent / "here").mkdir()
    settings = layered(file, mlx(model=model, modelPath=model_path), **environment)
    assert settings.model_key("/") == key


@pytest.mark.parametrize(
    ("flags", "environment", "data", "block"),
    [
        (Flags(mode="b"), {"ANYCLAUDE_MODE": "c"}, {"backend": "mlx", "backends": {"b": {}, "c": {}, "mlx": {}}}, "b"),
        (Flags(), {"ANYCLAUDE_MODE": "c"}, {"backend": "mlx", "backends": {"b": {}, "c": {}, "mlx": {}}}, "c"),
        (Flags(), {}, {"backend": "mlx", "backends": {"b": {}, "mlx": {}}}, "mlx"),
        (Flags(), {}, {"backends": {"mlx": {"enabled": False}, "mlx-lm": {}}}, "mlx-lm"),
        (Flags(), {}, {"backends": {"mlx": {}, "vllm-mlx": {}}}, "mlx"),
        (Flags(), {}, {}, "mlx"),
        (Flags(mode="MLX"), {}, {"backends": {"mlx": {}}}, "mlx"),
        (Flags(mode="mlx"), {}, {"backends": {"mlx-textgen": {}}}, "mlx-textgen"),
        (Flags(mode="mlx-textgen"), {}, {"backends": {"vllm-mlx": {}}}, "vllm-mlx"),
        (Flags(mode="vllm-mlx"), {}, {"backends": {"mlx": {}, "mlx-lm": {}}}, "mlx"),
        (Flags(mode="mlx-legacy"), {}, {"backends": {"vllm-mlx-legacy": {}}}, "vllm-mlx-legacy"),
        (Flags(mode="local"), {}, {"backends": {"lmstudio": {"modelPath": "/m"}}}, "lmstudio"),
        (Flags(mode="mlx"), {}, {"backends": {"mlx-legacy": {}}}, "mlx"),
        (Flags(demo=True), {"ANYCLAUDE_MODE": "claude"}, {"backends": {"vllm-mlx": {}}}, "vllm-mlx"),
        (Flags(model="/m"), {}, {"backend": "lmstudio", "backends": {"lmstudio": {"port": 1234}}}, "mlx"),
    ],
)
def test_which_block_is_meant(
    flags: Flags, environment: dict[str, str], data: dict[str, Any], block: str, file: Path
) -> None:
    assert layered(file, data, flags, **environment).block == block


@pytest.mark.parametrize(
    ("mode", "data", "code", "exit_code"),
    [
        ("nope", {}, "unknown_mode", 4),
        ("mlx", {"backends": {"mlx-textgen": {}, "vllm-mlx": {}}}, "ambiguous_mode", 4),
        ("claude", {}, "nothing_to_start", 1),
        ("openrouter", {}, "nothing_to_start", 1),
        ("lmstudio", {"backends": {"lmstudio": {"model": "current-model"}}}, "nothing_to_start", 1),
        (None, {"backend": 7}, "config_invalid", 4),
        (None, {"backends": []}, "config_invalid", 4),
    ],
)
def test_modes_that_cannot_be_started(
    mode: str | None, data: dict[str, Any], code: str, exit_code: int, file: Path
) -> None:
    with pytest.raises(LaunchError) as caught:
        layered(file, data, Flags(mode=mode))
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.hint


def test_what_is_wrong_elsewhere_is_a_note(file: Path) -> None:
    data = {"debug": {"level": "x"}, "backends": {"mlx": {"prt": 1}, "other": {"port": "x"}}}
    settings = layered(file, data)
    assert [note.removeprefix(f"{file}: ").partition(":")[0] for note in settings.notes] == [
        "backends.mlx.prt",
        "debug.level",
    ]
    with pytest.raises(LaunchError, match=r"backends.other.port"):
        layered(file, data, Flags(mode="other"))


def test_an_error_counts_the_others(file: Path) -> None:
    with pytest.raises(LaunchError, match=r"backends.mlx.port: .* \(and 2 more, see mlx-launch config validate\)"):
        layered(file, mlx(port="x", host="y", maxQueue=0))


def test_what_is_shown_hides_keys_and_uses_the_files_units(file: Path) -> None:
    shown = rows(
        layered(file, mlx(apiKey="s3cret", env={"TOKEN": "s3cret"}, stopTimeout=1500, restart={"backoff": "0.1s"}))
    )
    assert "s3cret" not in json.dumps(shown)
    assert shown["apiKey"]["value"] == MASK
    assert shown["env"]["value"] == {"TOKEN": MASK}
    assert shown["stopTimeout"] == {"value": "1.5s", "origin": f"{file} backends.mlx.stopTimeout"}
    assert shown["restart.backoff"]["value"] == "100ms"
    assert shown["mode"] == {"value": "mlx", "origin": f"{file}, its only MLX backend that is enabled"}
