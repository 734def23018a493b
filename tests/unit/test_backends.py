"""From flags to a plan: what is served, under which names, on which addresses, and what is refused before a start."""

import json
import os
import sys
from pathlib import Path

import pytest

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.backends.models import check_model, served_names
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.host.settings import CacheSettings, Settings
from mlx_launcher.plan import Backend, Plan

FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_random(tmp_path / "Qwen3_Coder-30B-4bit")


def plan_for(flags: Flags, tmp_path: Path, **environment: str) -> Plan:
    return assemble(flags, tmp_path / "state", Caller(["mlx-launch", "start"], str(tmp_path), environment))


def test_a_plan_is_whole_plain_json_and_matches_its_types(model: Path, tmp_path: Path) -> None:
    plan = plan_for(Flags(str(model)), tmp_path)
    assert json.loads(json.dumps(plan)) == plan
    assert plan.keys() == Plan.__annotations__.keys()
    assert plan["backend"].keys() == Backend.__annotations__.keys()
    assert plan["backend"]["settings"].keys() == Settings.__required_keys__
    assert plan["backend"]["settings"]["cache"].keys() == CacheSettings.__annotations__.keys()


def test_the_numbers_that_the_documentation_promises(model: Path, tmp_path: Path) -> None:
    plan = plan_for(Flags(str(model)), tmp_path)
    assert (plan["port"], plan["url"], plan["hosts"]) == (8081, "http://127.0.0.1:8081/v1", ["127.0.0.1", "::1"])
    assert (plan["stop_timeout_s"], plan["hang_timeout_s"], plan["freeze_timeout_s"], plan["idle_timeout_s"]) == (
        30,
        120,
        30,
        0,
    )
    assert plan["restart"] == {"max_restarts": 3, "window_s": 300, "backoff_s": 0.5, "backoff_max_s": 30}
    settings = plan["backend"]["settings"]
    assert settings["cache"] == {
        "enabled": True,
        "dir": str(tmp_path / "state" / "kvcache"),
        "slots": 10,
        "min_tokens": 100,
        "memory_bytes": None,
        "max_bytes": None,
    }
    assert (settings["max_queue"], settings["accept_any_model"], settings["max_body_bytes"]) == (32, True, 33554432)


def test_the_server_is_our_host_in_our_own_interpreter(model: Path, tmp_path: Path) -> None:
    backend = plan_for(Flags(str(model)), tmp_path)["backend"]
    kept = str(tmp_path / "state" / "transformers.json")
    assert backend["argv"] == [sys.executable, "-P", "-m", "mlx_launcher.host", "--imports", kept, "textgen"]
    assert backend["kind"] == "host"


def test_a_relative_model_is_found_from_where_the_command_ran(model: Path, tmp_path: Path) -> None:
    plan = plan_for(Flags(f"./{model.name}/"), tmp_path)
    assert plan["model"] == {"id": f"./{model.name}/", "path": str(model)}
    assert plan["backend"]["settings"]["names"] == [f"./{model.name}/", model.name, "qwen3-coder-30b", str(model)]


def test_a_relative_log_file_is_too(model: Path, tmp_path: Path) -> None:
    assert plan_for(Flags(str(model), log_file="my.log"), tmp_path)["log_file"] == str(tmp_path / "my.log")
    assert plan_for(Flags(str(model)), tmp_path)["log_file"] == str(tmp_path / "state" / "8081" / "server.log")


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/m/Llama_3-8B-Instruct-4bit", "llama-3-8b-instruct"),
        ("/m/gpt-oss-20b-MXFP4-8bits", "gpt-oss-20b-mxfp4"),
        ("/m/Qwen3-8B", "qwen3-8b"),
        ("/m/plain", "plain"),
    ],
)
def test_the_short_name_is_mlx_textgens(path: str, short: str) -> None:
    assert short in served_names(["id"], path)


def test_names_are_distinct_and_never_empty() -> None:
    assert served_names(["/m/bitnet"], "/m/bitnet") == ["/m/bitnet", "bitnet"]
    assert served_names(["demo"], "/m/demo") == ["demo", "/m/demo"]


@pytest.mark.parametrize(
    ("host", "hosts", "url"),
    [
        ("127.0.0.1", ["127.0.0.1", "::1"], "http://127.0.0.1:81/v1"),
        ("localhost", ["127.0.0.1", "::1"], "http://127.0.0.1:81/v1"),
        ("127.0.0.2", ["127.0.0.2"], "http://127.0.0.2:81/v1"),
        ("::1", ["::1"], "http://[::1]:81/v1"),
    ],
)
def test_a_loopback_address_accepts_a_key_and_asks_for_none(
    host: str, hosts: list[str], url: str, model: Path, tmp_path: Path
) -> None:
    plan = plan_for(Flags(str(model), 81, host), tmp_path, MLX_API_KEY="k")
    assert (plan["hosts"], plan["url"]) == (hosts, url)
    assert (plan["backend"]["settings"]["api_key"], plan["backend"]["settings"]["require_key"]) == ("k", False)


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:81/v1"), ("::", "http://[::1]:81/v1"), ("10.1.2.3", None)]
)
def test_an_address_that_others_reach_demands_a_key(host: str, url: str | None, model: Path, tmp_path: Path) -> None:
    flags = Flags(str(model), 81, host)
    for environment in ({}, {"MLX_API_KEY": ""}):
        with pytest.raises(LaunchError) as caught:
            plan_for(flags, tmp_path, **environment)
        assert caught.value.code == "key_required"
        assert "MLX_API_KEY" in caught.value.hint
    plan = plan_for(flags, tmp_path, MLX_API_KEY="k")
    assert plan["hosts"] == [host]
    assert plan["url"] == (url or f"http://{host}:81/v1")
    assert plan["backend"]["settings"]["require_key"] is True


def test_a_host_name_is_no_address(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        plan_for(Flags(str(model), host="example.org"), tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("usage", 2)


def test_the_key_stays_out_of_argv_and_of_the_servers_environment(model: Path, tmp_path: Path) -> None:
    backend = plan_for(Flags(str(model)), tmp_path, MLX_API_KEY="secret")["backend"]
    assert "secret" not in json.dumps([backend["argv"], backend["env"]])


@pytest.mark.parametrize("missing", FILES)
def test_an_incomplete_model_is_named_with_what_it_lacks(missing: str, model: Path) -> None:
    check_model(model)
    (model / missing).unlink()
    with pytest.raises(LaunchError) as caught:
        check_model(model)
    assert caught.value.code == "model_incomplete"
    assert str(model) in caught.value.message
    assert Path(missing).suffix in caught.value.message


def test_a_model_that_is_missing_or_a_file(model: Path, tmp_path: Path) -> None:
    for path, word in ((tmp_path / "no such", "no model"), (model / "config.json", "file")):
        with pytest.raises(LaunchError) as caught:
            check_model(path)
        assert caught.value.code == "model_not_found"
        assert str(path) in caught.value.message
        assert word in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_model_that_must_not_be_read(model: Path) -> None:
    model.chmod(0)
    with pytest.raises(LaunchError, match="cannot be read"):
        check_model(model)
