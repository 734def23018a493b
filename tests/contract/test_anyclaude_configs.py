"""Every configuration file in anyclaude's history: served, or one line that says why not.

The shapes are those of the files at the commits named, with texts shortened and models' paths replaced.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.launched import Launcher, chat, http_request
from support.waiting import until

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.cli.output import error_line
from mlx_launcher.config.check import check_all
from mlx_launcher.config.document import read
from mlx_launcher.demo import build_demo, build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.plan import Plan

HISTORY: list[dict[str, Any]] = json.loads((Path(__file__).parent / "anyclaude" / "configs.json").read_text())
PLACEHOLDER = "/path/to/your/mlx/model"
LM_STUDIO = "mode lmstudio uses the server that runs already"
NO_SCRIPT = r"serverScript: there is no script \S+/scripts/vllm-mlx-server"
ELSEWHERE = "is another machine"
NO_MLX = "has no backend mlx"

# (commit, file): the block that is served with the file's own mode, and whether by the legacy server, or why none is; the same
# with --mode=mlx.
OUTCOMES: dict[tuple[str, str], tuple[str, str]] = {
    ("1303bab", ".anyclauderc.json"): (LM_STUDIO, NO_MLX),
    ("be10fd7", ".anyclauderc.json"): ("served mlx-lm", NO_MLX),
    ("384effc", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("17cd143", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("72fdc29", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("506745c", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("8c234a0", ".anyclauderc.example.json"): (NO_SCRIPT, NO_SCRIPT),
    ("9eb90a7", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("f4a8e06", ".anyclauderc.example-openrouter.json"): ("mode openrouter", NO_MLX),
    ("9c72249", ".anyclauderc.json"): ("served vllm-mlx", "served vllm-mlx"),
    ("adee324", ".anyclauderc.json"): (NO_SCRIPT, NO_SCRIPT),
    ("73db8f4", ".anyclauderc.json"): (LM_STUDIO, "served vllm-mlx"),
    ("f2d169f", ".anyclauderc.example.json"): ("served mlx-textgen", "served mlx-textgen"),
    ("8366a02", ".anyclauderc.example.json"): ("served mlx-textgen", "served mlx-textgen"),
    ("8366a02", ".anyclauderc.json"): ("served mlx legacy", "served mlx legacy"),
    ("9a7f84c", ".anyclauderc.json"): ("served vllm-mlx legacy", "served vllm-mlx legacy"),
    ("2439220", ".anyclauderc.example-openrouter.json"): ("mode openrouter", NO_MLX),
    ("2439220", ".anyclauderc.example.json"): ("served mlx legacy", "served mlx legacy"),
    ("2bd8b12", ".anyclauderc.json"): ("served mlx legacy", "served mlx legacy"),
    ("3b27ebc", ".anyclauderc.example.json"): ("served mlx legacy", "served mlx legacy"),
    ("a6a3d25", ".anyclauderc.example.json"): ("served mlx", "served mlx"),
    ("69322a9", ".anyclauderc.example.json"): (LM_STUDIO, NO_MLX),
    ("69322a9", ".anyclauderc.json"): (LM_STUDIO, NO_MLX),
    ("cf3c24e", ".anyclauderc.json"): ("served mlx", "served mlx"),
    ("5f75bc2", ".anyclauderc.json"): (LM_STUDIO, NO_MLX),
    ("8a36247", ".anyclauderc.example.json"): (LM_STUDIO, NO_MLX),
    ("cc39b92", ".anyclauderc.example.json"): ("served lmstudio", NO_MLX),
    ("8a467d7", ".anyclauderc.example.json"): ("served local", NO_MLX),
    ("8a467d7", ".anyclauderc.json"): (ELSEWHERE, NO_MLX),
    ("1b198d4", ".anyclauderc.example.json"): ("served lmstudio", NO_MLX),
    ("adeb579", ".anyclauderc.json"): (ELSEWHERE, NO_MLX),
    ("bddaf1a", ".anyclauderc.json"): (ELSEWHERE, NO_MLX),
    ("fa43233", ".anyclauderc.example.json"): ("served lmstudio", NO_MLX),
    ("9e444a1", ".anyclauderc.example.json"): ("served lmstudio", NO_MLX),
    ("1dfeddc", ".anyclauderc.json"): (ELSEWHERE, NO_MLX),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "model")


def written(entry: dict[str, Any], directory: Path, model: Path) -> Path:
    text = json.dumps(entry["config"]).replace(PLACEHOLDER, str(model)).replace("/path/to/mlx/model", str(model))
    file = directory / ".anyclauderc.json"
    file.write_text(text)
    return file


def plan_of(file: Path, mode: str | None = None) -> Plan:
    return assemble(Flags(mode=mode), file.parent / "state", Caller([], str(file.parent), {}), read(file))


def entry_id(entry: dict[str, Any]) -> str:
    return f"{entry['commit']}-{entry['file']}"


def test_each_file_has_an_outcome() -> None:
    assert [(entry["commit"], entry["file"]) for entry in HISTORY] == list(OUTCOMES)


@pytest.mark.parametrize("entry", HISTORY, ids=entry_id)
def test_served_or_one_line(entry: dict[str, Any], tmp_path: Path, model: Path) -> None:
    file = written(entry, tmp_path, model)
    for mode, outcome in zip((None, "mlx"), OUTCOMES[entry["commit"], entry["file"]], strict=True):
        if not outcome.startswith("served"):
            with pytest.raises(LaunchError) as caught:
                plan_of(file, mode)
            line = error_line(caught.value)
            assert re.search(outcome, line), line
            assert caught.value.hint
            assert caught.value.exit_code in (1, 4)
            assert "\n" not in line
        else:
            plan = plan_of(file, mode)
            block = entry["config"]["backends"][plan["backend"]["name"]]
            legacy = " legacy" if plan["backend"]["argv"][-1] == "legacy" else ""
            assert f"served {plan['backend']['name']}{legacy}" == outcome
            assert plan["notes"] == []
            # What anyclaude sends as the model's name is answered to, and it is the name shown.
            assert plan["model"] == {"id": block["model"].replace(PLACEHOLDER, str(model)), "path": str(model)}
            assert plan["backend"]["settings"]["names"][0] == plan["model"]["id"]
            assert str(plan["port"]) in block["baseUrl"]


@pytest.mark.parametrize("entry", HISTORY, ids=entry_id)
def test_no_key_of_anyclaudes_is_unknown(entry: dict[str, Any], tmp_path: Path, model: Path) -> None:
    problems = check_all(read(written(entry, tmp_path, model)))
    assert [problem for problem in problems if problem.severity == "warning"] == []


def test_the_format_before_json_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / ".anyclauderc"
    file.write_text("# AnyClaude Configuration File\nANYCLAUDE_MODE=mlx-lm\nMLX_MODEL=/models/m\n")
    with pytest.raises(LaunchError, match="line 1, column 1") as caught:
        read(file)
    assert caught.value.exit_code == 4


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()


def test_the_example_of_8366a02_with_a_real_model_is_served(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_demo(tmp_path / "models" / "my model")
    example = next(e for e in HISTORY if (e["commit"], e["file"]) == ("8366a02", ".anyclauderc.example.json"))
    text = json.dumps(example["config"]).replace(PLACEHOLDER, str(model)).replace("8080", str(launcher.port))
    (tmp_path / ".anyclauderc.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    done = launcher.command("start", "--mode=mlx")
    assert (done.returncode, done.stderr) == (0, "")
    # The name that anyclaude sends is the config's `model`, which is a path here.
    assert chat(launcher.port, "Hello", model=str(model)).status == 200
    assert launcher.status()["backend"] == "mlx-textgen"


def test_what_init_writes_serves_when_anyclaude_starts_it(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launcher.command("config", "init", "--port", str(launcher.port)).returncode == 0
    block = json.loads((tmp_path / ".anyclauderc.json").read_text())["backends"]["mlx"]
    # anyclaude's `startVLLMMLXServer`, to the letter.
    line = f'bash {block["serverScript"]} "{block["modelPath"]}" {block["port"]} "{tmp_path / "mlx.log"}" 2>&1'
    server = subprocess.Popen(
        ["bash", "-c", line], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until(lambda: _answers(launcher.port), 60, "the server")
        assert chat(launcher.port, "Hello", model=block["model"]).status == 200
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    until(lambda: not launcher.processes(), 30, "an end without leftovers")


def _answers(port: int) -> bool:
    try:
        return http_request(port, "/v1/models", timeout_s=10).status == 200
    except ConnectionRefusedError:
        return False
