"""`config show`, `validate`, `init`, `schema`, `path`, the hidden `plan`, and the script that anyclaude calls."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.cli import main
from mlx_launcher.config import first
from mlx_launcher.config.document import read
from mlx_launcher.config.schema import json_schema
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError

ROOT = Path(__file__).parents[2]
LIST_IMPORTS = """
import json, sys
from mlx_launcher.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write("\\n" + json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


class Command:
    """The command in this process, in a directory and a home of its own."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.file = root / ".anyclauderc.json"
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["--state-dir", str(self.root / "state"), *arguments])
        out, err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    def json(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self(*arguments, "--json")[1]))

    def write(self, **block: Any) -> None:
        self.file.write_text(json.dumps({"backends": {"mlx": block}}))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")):
            monkeypatch.delenv(name)
    return Command(tmp_path, capsys)


def test_path(command: Command) -> None:
    code, _, err = command("config", "path")
    assert code == 1
    assert "config init" in err
    command.write()
    assert command("config", "path") == (0, f"{command.file}\n", "")
    assert command.json("config", "path")["data"] == {"file": str(command.file)}
    assert command("--config", "other", "config", "path")[1] == f"{command.root / 'other'}\n"
    assert command("--no-config", "config", "path")[0] == 1


def test_show_with_origins(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MODEL", "m")
    command.write(apiKey="s3cret", stopTimeout="5m")
    code, out, err = command("config", "show", "--origin", "--port", "7")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split(None, 1)[1] for line in out.splitlines()}
    assert lines["port"] == "7  (flag --port)"
    assert lines["model"] == "m  (environment MLX_MODEL)"
    assert lines["stopTimeout"] == f"300s  ({command.file} backends.mlx.stopTimeout)"
    assert lines["maxQueue"] == "32  (default)"
    assert "s3cret" not in out
    assert "(default)" not in command("config", "show")[1]
    data = command.json("config", "show")["data"]
    assert data["values"]["stopTimeout"]["value"] == "300s"
    assert (data["file"], data["backend"]) == (str(command.file), "mlx")


def test_show_without_a_file(command: Command) -> None:
    assert command.json("config", "show")["data"]["values"]["port"] == {"value": 8081, "origin": "default"}


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"model": "a-name"}, 'backends.mlx.model: "a-name" is a name'),
        ({"serverScript": "/no/such"}, "backends.mlx.serverScript: there is no script /no/such"),
        ({"modelPath": "/no/such"}, "backends.mlx.modelPath: there is no model at /no/such"),
    ],
)
def test_validate_names_the_file_once(block: dict[str, Any], problem: str, command: Command) -> None:
    command.write(**block)
    _, out, err = command("config", "validate")
    assert out.partition(": ")[2].startswith(f"{command.file}: {problem}")
    assert err.count(str(command.file)) <= 1
    assert out.count(str(command.file)) == 1


def test_validate_lists_everything(command: Command) -> None:
    command.write(port="x", prt=1, cache={"cache_slots": []})
    code, out, err = command("config", "validate")
    assert code == 4
    assert len(out.splitlines()) == 3
    assert err.startswith(f"mlx-launch: {command.file}: 2 errors, the first: backends.mlx.port: ")
    envelope = command.json("config", "validate")
    assert [problem["path"] for problem in envelope["data"]["problems"]] == [
        "backends.mlx.port",
        "backends.mlx.cache.cache_slots",
        "backends.mlx.prt",
    ]
    assert envelope["data"]["problems"][2]["hint"] == "Did you mean port?"
    assert envelope["errors"][0]["code"] == "config_invalid"


def test_validate_looks_at_what_the_file_names(command: Command, tmp_path: Path) -> None:
    model = build_random(tmp_path / "model")
    command.write(modelPath=str(model), serverScript="gone.sh")
    assert command("config", "validate")[0] == 4
    command.write(modelPath=str(model))
    assert command("config", "validate") == (0, f"{command.file}: nothing is wrong.\n", "")
    command.write(modelPath="gone")
    code, out, _ = command("config", "validate")
    assert code == 0
    assert out.startswith("warning: ")
    (model / "config.json").unlink()
    command.write(modelPath=str(model))
    assert "no config.json" in command("config", "validate")[1]


def test_schema(command: Command) -> None:
    assert json.loads(command("config", "schema")[1]) == json_schema()
    assert command.json("config", "schema")["data"] == json_schema()


def test_init_writes_what_anyclaudes_mode_mlx_needs(command: Command, tmp_path: Path) -> None:
    model = build_random(tmp_path / "a model")
    code, _, err = command("config", "init", "--model", "a model", "--port", "8099")
    assert (code, err) == (0, "")
    written = json.loads(command.file.read_text())
    block = written["backends"]["mlx"]
    # What `server-launcher.ts` and `getBackendConfig` of anyclaude look at.
    assert written["backend"] == "mlx"
    assert Path(written["pythonVenv"], "bin", "activate").is_file()
    assert block["modelPath"] == str(model)
    assert (block["port"], block["baseUrl"]) == (8099, "http://localhost:8099/v1")
    script = Path(block["serverScript"])
    assert script.is_absolute()
    assert script.suffix == ".sh"
    assert os.access(script, os.X_OK)
    assert not set(str(script)) & set(" '\"$`\\;&|<>()*?[]{}~#!")
    assert stat.S_IMODE(command.file.stat().st_mode) == 0o600
    assert command("config", "validate")[0] == 0


def test_init_without_a_model_serves_the_demo(command: Command) -> None:
    data = command.json("config", "init")["data"]
    assert data["notes"] == []
    model = Path(read(command.file).data["backends"]["mlx"]["modelPath"])
    assert (model / "config.json").is_file()
    plan = command.json("plan")["data"]
    assert (plan["model"], plan["backend"]["kind"]) == ({"id": "demo", "path": str(model)}, "host")


def test_init_never_overwrites(command: Command) -> None:
    command.file.write_text("mine")
    code, _, err = command("config", "init")
    assert code == 1
    assert "--force" in err
    assert command.file.read_text() == "mine"
    assert not (command.root / "state").exists()
    backup = Path(command.json("config", "init", "--force")["data"]["backup"])
    assert backup.read_text() == "mine"
    assert backup.parent == command.root
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600  # what was there may hold a key
    assert "backends" in read(command.file).data
    assert len(list(command.root.glob(".anyclauderc.json*"))) == 2


def test_two_backups_in_one_second_are_two(command: Command) -> None:
    for text in ("one", "two", "three"):
        command.file.write_text(text)
        assert command("config", "init", "--force")[0] == 0
    kept = {file.read_text() for file in command.root.glob(".anyclauderc.json.*")}
    assert kept == {"one", "two", "three"}


def test_init_writes_through_a_link(command: Command) -> None:
    real = command.root / "real.json"
    real.write_text("{}")
    command.file.symlink_to(real)
    assert command("config", "init", "--force")[0] == 0
    assert command.file.is_symlink()
    assert "backends" in json.loads(real.read_text())


def test_init_names_what_anyclaude_cannot_do(command: Command, tmp_path: Path) -> None:
    build_random(tmp_path / "it $costs")
    notes = command.json("config", "init", "other.json", "--model", "it $costs")["data"]["notes"]
    assert len(notes) == 2
    assert "only .anyclauderc.json" in notes[0]
    assert "$costs" in notes[1]


def test_a_script_never_lies_where_anyclaudes_shell_would_break_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    script = first.install_script(tmp_path / "with a space", True)
    assert script == tmp_path / "venv" / "share" / "mlx-launch" / "mlx-textgen-server.sh"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "also $HOME"))
    with pytest.raises(LaunchError, match="without spaces"):
        first.install_script(tmp_path / "with a space", True)


@pytest.mark.parametrize("installed", [True, False])
def test_the_script_hands_over_to_run(installed: bool, tmp_path: Path) -> None:
    """Called as anyclaude calls it, with a python that shows what it was called with."""
    shown = tmp_path / "it's python"
    shown.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    shown.chmod(0o755)
    environment = {"PATH": os.environ["PATH"]}
    if installed:
        script = first.install_script(tmp_path / "state", True)
        text = script.read_text()
        assert f"python={sys.executable}\n" in text
        script.write_text(text.replace(f"python={sys.executable}", f'python="{shown}"'))
    else:
        script = ROOT / "scripts" / "mlx-textgen-server.sh"
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        (tmp_path / "venv" / "bin" / "python").symlink_to(shown)
        environment["VIRTUAL_ENV"] = str(tmp_path / "venv")
    line = f'bash {script} "-my \'model" 8081 "/log file" 2>&1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=30)
    state = [f"--state-dir={tmp_path / 'state'}"] if installed else []
    expected = ["-P", "-m", "mlx_launcher", *state, "run", "--with-caller", "--model=-my 'model", "--port=8081"]
    assert done.stdout.splitlines() == expected


def test_the_script_says_what_it_lacks() -> None:
    script = str(ROOT / "scripts" / "mlx-textgen-server.sh")
    done = subprocess.run(["/bin/bash", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (2, f"usage: bash {script} MODEL PORT [LOG]\n")
    poor = {"PATH": "/nonexistent"}
    done = subprocess.run(["/bin/bash", script, "m", "1"], capture_output=True, text=True, env=poor, timeout=30)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


# -- the plan that a supervisor asks for again


def test_a_plan_prints_itself_again(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_random(tmp_path / "-model")
    command.write(apiKey="k", stopTimeout="10s", prt=1)
    plan = command.json("plan", "--model=-model", "--port=8099", "--log-file=a b")["data"]
    source = plan["source"]
    assert source["argv"][:5] == [sys.executable, "-P", "-m", "mlx_launcher", "--json"]
    assert f"--config={command.file}" in source["argv"]
    monkeypatch.chdir("/")
    done = subprocess.run(
        source["argv"], cwd=source["cwd"], env=source["env"], capture_output=True, text=True, timeout=60
    )
    envelope = json.loads(done.stdout)
    assert (envelope["command"], envelope["ok"]) == ("plan", True)
    assert envelope["data"] == plan
    assert plan["notes"] == [f"{command.file}: backends.mlx.prt: this key is not known. Did you mean port?"]

    command.write(port="x")
    done = subprocess.run(
        source["argv"], cwd=source["cwd"], env=source["env"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    assert json.loads(done.stdout)["errors"][0]["code"] == "config_invalid"


def test_a_plan_without_a_file_stays_without_one(command: Command, tmp_path: Path) -> None:
    build_random(tmp_path / "model")
    argv = command.json("plan", "--model", "model")["data"]["source"]["argv"]
    assert "--no-config" in argv


def test_a_plan_is_not_shown_to_people(command: Command) -> None:
    assert command("plan", "--demo")[0] == 2


def test_what_a_start_without_a_file_imports(tmp_path: Path) -> None:
    arguments = ["--json", "--no-config", "--state-dir", str(tmp_path), "plan", "--demo"]
    done = subprocess.run([sys.executable, "-c", LIST_IMPORTS, *arguments], capture_output=True, text=True, timeout=60)
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    assert json.loads(done.stdout)["ok"]
    assert not imported & {"pydantic", "yaml", "mlx", "asyncio", "huggingface_hub", "difflib"}


def test_what_a_file_holds_does_not_reach_the_terminal_as_it_is(command: Command) -> None:
    command.write(model="red\x1b[31m\nmodel")
    _, out, _ = command("config", "show")
    assert "model                       red?[31m model" in out.splitlines()


def test_an_error_of_the_file_itself_has_no_place_before_it(command: Command) -> None:
    command.file.write_text(json.dumps({"backends": {"mlx-legacy": {"port": 8082}}}))
    err = command("config", "validate", "--mode", "mlx")[2]
    assert "1 error, the first: has no backend mlx" in err
