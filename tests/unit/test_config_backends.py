"""From a configuration file to a plan: values, names, the user's own scripts and commands, fallbacks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.config.document import read
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Plan, compared

HOST = [sys.executable, "-P", "-m", "mlx_launcher.host", "--imports"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_random(tmp_path / "Qwen3_Coder-30B-4bit")


class Configured:
    """A file with one block, in a directory of its own."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.file = directory / ".anyclauderc.json"
        self.model = model

    def plan(self, name: str = "mlx", top: dict[str, Any] | None = None, /, **block: Any) -> Plan:
        whole = {"backend": name, **(top or {}), "backends": {name: {"modelPath": str(self.model), **block}}}
        return self.plan_of(whole)

    def plan_of(self, whole: dict[str, Any], flags: Flags = Flags()) -> Plan:  # noqa: B008
        self.file.write_text(json.dumps(whole))
        caller = Caller(["x"], "/", {"PATH": os.environ["PATH"]})
        return assemble(flags, self.directory / "state", caller, read(self.file))

    def error(self, *args: Any, **block: Any) -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            self.plan(*args, **block)
        return caught.value

    def error_in(self, environment: dict[str, str], **block: Any) -> LaunchError:
        self.file.write_text(json.dumps({"backends": {"mlx": {"modelPath": str(self.model), **block}}}))
        with pytest.raises(LaunchError) as caught:
            assemble(Flags(), self.directory / "state", Caller(["x"], "/", environment), read(self.file))
        return caught.value

    def script(self, name: str, text: str = "#!/bin/sh\n") -> Path:
        script = self.directory / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(text)
        return script


@pytest.fixture
def configured(tmp_path: Path, model: Path) -> Configured:
    directory = tmp_path / 'it\'s a "project" ü'
    directory.mkdir()
    return Configured(directory, model)


def test_the_files_values_reach_the_plan(configured: Configured) -> None:
    plan = configured.plan(
        port=8099,
        host="127.0.0.2",
        apiKey="k",
        requireKey=True,
        acceptAnyModel=False,
        maxQueue=3,
        env={"A": "b"},
        stopTimeout="10s",
        hangTimeout=60000,
        freezeTimeout="20s",
        idleTimeout="1h",
        restart={"maxRestarts": 1, "window": "1m", "backoff": "1s", "backoffMax": "2s"},
        cache={
            "enable_cache": False,
            "cache_slots": 5,
            "min_tokens_for_cache": 7,
            "dir": "kv",
            "memoryBytes": "2GB",
            "maxBytes": "40GB",
        },
        warmup={"promptFiles": ["prompts/first.json", "/second.json", "~/third.json"]},
        metricsPort=9090,
    )
    assert (plan["port"], plan["hosts"], plan["url"]) == (8099, ["127.0.0.2"], "http://127.0.0.2:8099/v1")
    assert plan["restart"] == {"max_restarts": 1, "window_s": 60, "backoff_s": 1, "backoff_max_s": 2}
    timeouts = ("stop_timeout_s", "hang_timeout_s", "freeze_timeout_s", "idle_timeout_s")
    assert [plan[key] for key in timeouts] == [10, 60, 20, 3600]  # type: ignore[literal-required]
    settings = plan["backend"]["settings"]
    assert (settings["api_key"], settings["require_key"], settings["accept_any_model"]) == ("k", True, False)
    assert settings["max_queue"] == 3
    assert plan["metrics_port"] == 9090
    directory = str(configured.directory / "kv")
    cache = {"enabled": False, "dir": directory, "slots": 5, "min_tokens": 7}
    assert settings["cache"] == {**cache, "memory_bytes": 2_000_000_000, "max_bytes": 40_000_000_000}
    first, third = configured.directory / "prompts" / "first.json", Path("~/third.json").expanduser()
    assert settings["warmup"] == [str(first), "/second.json", str(third)]
    assert plan["backend"]["env"]["A"] == "b"


def test_the_metrics_have_a_port_of_their_own(configured: Configured) -> None:
    with pytest.raises(LaunchError, match=r"metricsPort: 8099 is the port of the server itself") as refused:
        configured.plan(port=8099, metricsPort=8099)
    assert refused.value.exit_code == 4


def test_the_clients_name_for_the_model_is_its_id(configured: Configured) -> None:
    plan = configured.plan(model="what anyclaude sends")
    assert plan["model"] == {"id": "what anyclaude sends", "path": str(configured.model)}
    names = plan["backend"]["settings"]["names"]
    assert names == ["what anyclaude sends", str(configured.model), configured.model.name, "qwen3-coder-30b"]


def test_a_flag_names_another_model_and_the_files_name_is_still_answered_to(
    configured: Configured, tmp_path: Path
) -> None:
    other = build_random(tmp_path / "other")
    whole = {"backends": {"mlx": {"model": "mine", "modelPath": str(configured.model)}}}
    plan = configured.plan_of(whole, Flags(model=str(other)))
    assert plan["model"] == {"id": str(other), "path": str(other)}
    assert "mine" in plan["backend"]["settings"]["names"]


def test_paths_start_from_the_file(configured: Configured) -> None:
    (configured.directory / "model").symlink_to(configured.model)
    assert configured.plan(modelPath="model")["model"]["path"] == str(configured.directory / "model")


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"modelPath": None}, "neither modelPath nor model is set"),
        ({"modelPath": None, "model": "current-model"}, "nothing is to be started for it"),
        ({"modelPath": None, "model": "gpt-oss"}, '"gpt-oss" is a name'),
    ],
)
def test_a_file_that_names_no_model_on_disk(block: dict[str, Any], says: str, configured: Configured) -> None:
    error = configured.error(**block)
    assert (error.code, error.exit_code) == ("no_model", 4)
    assert says in error.message


def test_a_name_of_the_environment_is_told_as_that(configured: Configured) -> None:
    error = configured.error_in({"MLX_MODEL": "gpt-oss"}, modelPath=None)
    assert error.message.startswith('environment MLX_MODEL: "gpt-oss" is a name')
    assert error.hint.startswith("Set MLX_MODEL to a directory")


def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(configured: Configured) -> None:
    error = configured.error_in({"MLX_API_KEY": "sk-planted\nmore"})
    assert error.exit_code == 4
    assert error.message.startswith("environment MLX_API_KEY: ")
    assert "sk-planted" not in error.message + error.hint


def test_a_model_that_is_missing_is_told_with_its_key(configured: Configured) -> None:
    error = configured.error(modelPath="/no/such")
    assert error.code == "model_not_found"
    assert error.message == f"{configured.file} backends.mlx.modelPath: there is no model at /no/such"


def test_a_shell_script_is_called_as_anyclaude_calls_it(configured: Configured) -> None:
    script = configured.script("my server's.sh")
    plan = configured.plan(serverScript=script.name, model="m", apiKey="k", env={"A": "b"})
    backend = plan["backend"]
    log = configured.directory / "state" / "8081" / "script.log"
    assert backend["argv"] == ["bash", str(script), str(configured.model), "8081", str(log)]
    assert (backend["kind"], backend["cwd"]) == ("script", str(configured.directory))
    assert backend["env"] == {"PYTHONUNBUFFERED": "1", "A": "b"}
    assert backend["settings"].keys() == {"model_id", "names", "api_key"}
    assert (backend["settings"]["model_id"], backend["settings"]["api_key"]) == ("m", "k")


def test_any_other_script_runs_in_the_virtual_environment(configured: Configured) -> None:
    script = configured.script(
        "-my $(touch x) 'server'.py", "import os, sys; print(sys.argv[1:], os.environ['IN_VENV'])"
    )
    (configured.directory / "venv dir").mkdir()
    configured.script("venv dir/bin/activate", "export IN_VENV=1\n")
    plan = configured.plan("mlx", {"pythonVenv": "venv dir"}, serverScript=script.name)
    done = subprocess.run(
        plan["backend"]["argv"], capture_output=True, text=True, cwd=plan["backend"]["cwd"], timeout=30
    )
    assert done.stdout.strip() == f"{['--model', str(configured.model), '--port', '8081']} 1"
    assert not (configured.directory / "x").exists()


def test_a_virtual_environment_that_is_missing(configured: Configured) -> None:
    error = configured.error("mlx", {"pythonVenv": "gone"}, serverScript=configured.script("s.py").name)
    assert (error.code, error.exit_code) == ("no_venv", 4)
    assert str(configured.directory / "gone") in error.message


@pytest.mark.parametrize(("name", "kind"), [("mlx-textgen-server.sh", "host"), ("other.sh", "script")])
def test_a_script_of_ours_is_known_by_its_marker(name: str, kind: str, configured: Configured) -> None:
    marked = configured.script("marked.sh", "#!/bin/bash\n" + "#\n" * 18 + "# mlx-launch built-in: textgen\n")
    assert configured.plan(serverScript=marked.name)["backend"]["kind"] == "host"
    too_late = configured.script("late.sh", "#!/bin/bash\n" + "#\n" * 19 + "# mlx-launch built-in: textgen\n")
    assert configured.plan(serverScript=too_late.name)["backend"]["kind"] == "script"
    # One that is there and has no marker is the user's, whatever its name.
    assert configured.plan(serverScript=configured.script(name).name)["backend"]["kind"] == "script"
    configured.script(name).unlink()
    if kind == "host":
        assert configured.plan(serverScript=name)["backend"]["kind"] == "host"
    else:
        error = configured.error(serverScript=name)
        assert (error.code, error.exit_code) == ("config_invalid", 4)
        assert f"backends.mlx.serverScript: there is no script {configured.directory / name}" in error.message


def test_our_own_script_has_its_marker(configured: Configured) -> None:
    shipped = Path(__file__).parents[2] / "scripts" / "mlx-textgen-server.sh"
    assert configured.plan(serverScript=str(shipped))["backend"]["kind"] == "host"


@pytest.mark.parametrize(
    "block",
    [{"name": "mlx-legacy"}, {"name": "vllm-mlx-legacy"}, {"name": "mlx", "serverScript": "scripts/mlx-server.py"}],
)
def test_the_legacy_server_is_our_host_too_and_has_no_fallback(block: dict[str, Any], configured: Configured) -> None:
    name = block.pop("name")
    plan = configured.plan(name, **block)
    assert plan["backend"]["argv"] == [*HOST, str(configured.directory / "state" / "transformers.json"), "legacy"]
    assert (plan["backend"]["name"], plan["backend"]["kind"], plan["fallback"]) == (name, "host", None)
    assert plan["backend"]["settings"].keys() == configured.plan()["backend"]["settings"].keys()
    script = configured.script("mine.sh")
    assert configured.plan(name, serverScript=script.name)["backend"]["kind"] == "script"


def test_our_own_legacy_script_has_its_marker(configured: Configured) -> None:
    shipped = Path(__file__).parents[2] / "scripts" / "mlx-server.py"
    assert configured.plan(serverScript=str(shipped))["backend"]["argv"][-1] == "legacy"


@pytest.mark.parametrize(
    "command",
    [
        [
            "python3",
            "-c",
            "import sys; print(sys.argv[1:])",
            "{model}",
            "{port}",
            "{host}",
            "{url}",
            "{state_dir}",
            "{x}",
        ],
        "python3 -c 'import sys; print(sys.argv[1:])' {model} {port} {host} {url} \"{state_dir}\" '{x}'",
    ],
)
def test_a_commands_placeholders_are_filled_in_without_a_shell(command: Any, configured: Configured) -> None:
    backend = configured.plan(command=command)["backend"]
    done = subprocess.run(backend["argv"], capture_output=True, text=True, cwd=backend["cwd"], timeout=30)
    instance = str(configured.directory / "state" / "8081")
    expected = [str(configured.model), "8081", "127.0.0.1", "http://127.0.0.1:8081/v1", instance, "{x}"]
    assert done.stdout.strip() == str(expected)
    assert backend["kind"] == "command"


def test_what_is_filled_in_is_not_filled_in_again(configured: Configured) -> None:
    odd = configured.directory / "-{port} $(x)"
    odd.symlink_to(configured.model)
    argv = configured.plan(command=["true", "--model={model}"], modelPath=str(odd))["backend"]["argv"]
    assert argv[1] == f"--model={odd}"


def test_a_command_that_names_no_model_needs_none(configured: Configured) -> None:
    plan = configured.plan(command="true --port {port}", modelPath=None)
    assert plan["model"] == {"id": "mlx", "path": ""}
    assert configured.error(command="true {model}", modelPath=None).code == "no_model"


def test_a_command_or_a_script_may_load_what_mlx_cannot(configured: Configured) -> None:
    file = configured.script("model.gguf")
    assert configured.plan(command="true {model}", modelPath=str(file))["model"]["path"] == str(file)


@pytest.mark.parametrize(
    ("command", "says"),
    [("no-such-program", "no program"), ("a 'b", "cannot be split"), ("", "modelPath"), (" ", "names no")],
)
def test_commands_that_cannot_be_run(command: str, says: str, configured: Configured) -> None:
    if command:
        error = configured.error(command=command)
        assert error.exit_code == 4
        assert "backends.mlx.command" in error.message
        assert says in error.message
    else:
        assert configured.plan(command=command)["backend"]["kind"] == "host"


def test_a_fallback_has_its_own_block_and_the_first_ones_port_and_model(configured: Configured) -> None:
    script = configured.script("second.sh")
    blocks = {
        "mlx": {"modelPath": str(configured.model), "model": "m", "port": 8099, "fallback": "second"},
        "second": {"enabled": False, "port": 1, "model": "other", "serverScript": script.name, "env": {"A": "b"}},
    }
    plan = configured.plan_of({"backend": "mlx", "backends": blocks})
    assert plan["fallback"]
    assert plan["fallback"]["name"] == "second"
    assert plan["fallback"]["argv"][:4] == ["bash", str(script), str(configured.model), "8099"]
    assert plan["fallback"]["settings"]["model_id"] == "m"
    assert plan["fallback"]["env"]["A"] == "b"


def test_by_default_the_legacy_server_takes_over_on_the_same_port_and_names(configured: Configured) -> None:
    plan = configured.plan(port=8099, model="m", apiKey="k", requireKey=True)
    fallback = plan["fallback"]
    assert fallback
    assert (fallback["name"], fallback["kind"], fallback["argv"][-1]) == ("mlx-legacy", "host", "legacy")
    assert fallback["settings"] == plan["backend"]["settings"]
    assert assemble(Flags(str(configured.model)), configured.directory, Caller(["x"], "/", {}))["fallback"]


def test_the_default_fallback_has_its_own_block_but_no_program_of_its_own(configured: Configured) -> None:
    blocks: dict[str, Any] = {
        "mlx": {"modelPath": str(configured.model)},
        "mlx-legacy": {"enabled": False, "port": 8082, "serverScript": "gone.py", "cache": {"memoryBytes": 5}},
    }
    plan = configured.plan_of({"backends": blocks})
    assert plan["fallback"]
    assert plan["fallback"]["argv"][-1] == "legacy"
    assert plan["fallback"]["settings"]["cache"]["memory_bytes"] == 5
    assert plan["port"] == 8081
    # A block that nobody named bars no start.
    blocks["mlx-legacy"] = {"cache": 1}
    plan = configured.plan_of({"backends": blocks})
    assert plan["fallback"]
    assert "the fallback's block is not used" in plan["notes"][-1]
    blocks["mlx"]["fallback"] = "mlx-legacy"
    with pytest.raises(LaunchError, match=r"backends\.mlx-legacy\.cache"):
        configured.plan_of({"backends": blocks})


def test_null_is_no_fallback(configured: Configured) -> None:
    assert configured.plan(fallback=None)["fallback"] is None
    assert configured.plan(fallback="mlx-legacy")["fallback"]


def test_what_only_a_program_of_the_users_can_load_has_no_default_fallback(configured: Configured) -> None:
    assert configured.plan(command="true --port {port}", modelPath=None)["fallback"] is None
    file = configured.script("model.gguf")
    assert configured.plan(command="true {model}", modelPath=str(file))["fallback"] is None
    assert configured.plan(command="true {model}")["fallback"]


def test_a_model_that_only_the_fallback_serves_is_for_the_host_to_refuse(configured: Configured) -> None:
    config = json.loads((configured.model / "config.json").read_text())
    (configured.model / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v41"}))
    assert configured.plan()["fallback"]
    assert configured.plan("mlx-legacy")["backend"]["argv"][-1] == "legacy"
    assert configured.error(fallback=None).code == "architecture_unsupported"


def test_a_key_that_is_required_must_be_there(configured: Configured) -> None:
    assert configured.error(requireKey=True).code == "key_required"
    assert "apiKey" in configured.error(requireKey=True).hint


def test_what_two_starts_are_compared_by(configured: Configured) -> None:
    plan = configured.plan(apiKey="s3cret", env={"TOKEN": "s3cret"})
    assert compared(plan) == compared(
        configured.plan(apiKey="s3cret", env={"TOKEN": "s3cret"}, model="called otherwise")
    )
    assert "s3cret" not in json.dumps(compared(plan))
    others: list[dict[str, Any]] = [
        {"apiKey": "x"}, {"env": {}}, {"stopTimeout": 1}, {"maxQueue": 1}, {"cache": {"cache_slots": 1}},
        {"restart": {"window": 1}}, {"host": "127.0.0.2"}, {"port": 9}, {"requireKey": True},
    ]  # fmt: skip
    for other in others:
        assert compared(configured.plan(**{"apiKey": "s3cret", "env": {"TOKEN": "s3cret"}, **other})) != compared(plan)


def test_a_standby_is_asked_for(configured: Configured) -> None:
    assert (configured.plan()["standby"], configured.plan(standby=True)["standby"]) == (False, True)


def test_what_a_server_of_ones_own_cannot_have_is_said(configured: Configured) -> None:
    wanted: dict[str, Any] = {"idleTimeout": "1h", "standby": True}
    assert configured.plan(**wanted)["notes"] == []
    assert configured.plan(command=["true", "{port}"])["notes"] == []
    assert configured.plan(command=["true", "{port}"], **wanted)["notes"] == [
        "idleTimeout has no effect on a server of your own (command or serverScript)",
        "standby has no effect on a server of your own (command or serverScript)",
    ]
