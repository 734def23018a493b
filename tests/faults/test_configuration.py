"""Rows 51, 52 and 55 of FAULTS.md: poor surroundings, hard names, and configurations that cannot be."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.launched import Launcher, chat
from support.unprivileged import drop_capabilities
from support.waiting import free_port

from mlx_launcher.demo import build_random

FAKE_SCRIPT = Path(__file__).parents[1] / "fakes" / "script.py"
HARD = '-it\'s "hard" $(touch x) `y` 模型 {port}'
_OURS = ("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")


def surroundings(**changes: str | None) -> dict[str, str]:
    """This environment without settings of ours, changed; None takes a variable out."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {name: value for name, value in {**plain, **changes}.items() if value is not None}


def command(
    *arguments: str, cwd: Path, unprivileged: bool = False, **changes: str | None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "mlx_launcher", *arguments],
        cwd=cwd,
        env=surroundings(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        preexec_fn=drop_capabilities if unprivileged else None,
    )


def one_line(done: "subprocess.CompletedProcess[str]", exit_code: int) -> str:
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert done.stderr.startswith("mlx-launch: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


# -- 51


@pytest.mark.parametrize(
    "home", [None, "", "/nonexistent/home", "/proc"], ids=["unset", "empty", "missing", "read-only"]
)
def test_51_without_a_home_it_works_where_it_is_told_to_keep_its_state(
    home: str | None, launcher: Launcher, tmp_path: Path
) -> None:
    poor: dict[str, Any] = {"HOME": home, "TERM": "dumb", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}
    options = ("--state-dir", str(launcher.state_dir))
    done = command(*options, "start", "--demo", "--port", str(launcher.port), cwd=tmp_path, **poor)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert chat(launcher.port, "Hello").status == 200
    assert command(*options, "stop", cwd=tmp_path, **poor).returncode == 0


def test_51_a_home_that_cannot_be_written_says_what_it_needs(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    for arguments in (("start", "--demo"), ("config", "init")):
        line = one_line(command(*arguments, cwd=tmp_path, unprivileged=True, HOME=str(home)), 1)
        assert str(home) in line
        assert "--state-dir" in line
    assert list(home.iterdir()) == []


def test_51_a_home_that_does_not_exist_says_what_it_needs(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    home = str(closed / "home")
    line = one_line(command("start", "--demo", cwd=tmp_path, unprivileged=True, HOME=home), 1)
    assert "--state-dir" in line
    assert one_line(command("status", cwd=tmp_path, HOME=home), 3)
    assert one_line(command("start", cwd=tmp_path, HOME=home), 2)
    assert list(closed.iterdir()) == []


# -- 52


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    directory = tmp_path / HARD
    directory.mkdir()
    return directory


@pytest.fixture
def hard_launcher(hard: Path) -> Any:
    launcher = Launcher(hard / f"state {HARD}")
    yield launcher
    launcher.clean_up()


def test_52_hard_names_for_configuration_model_and_state(hard: Path, hard_launcher: Launcher) -> None:
    model = build_random(hard / HARD)
    (hard / f"{HARD}.json").write_text(
        json.dumps({"backends": {"mlx": {"modelPath": HARD, "port": hard_launcher.port}}})
    )
    options = (f"--config={HARD}.json", "--state-dir", str(hard_launcher.state_dir))
    done = command(*options, "start", cwd=hard)
    assert (done.returncode, done.stderr) == (0, "")
    reply = chat(hard_launcher.port, "Hello", model=HARD, max_tokens=2)
    assert reply.status == 200
    assert hard_launcher.status()["model"] == {"id": HARD, "path": str(model)}
    assert command(*options, "restart", cwd=hard).returncode == 0
    assert chat(hard_launcher.port, "Hello", max_tokens=2).status == 200
    assert command(*options, "stop", cwd=hard).returncode == 0
    assert not (hard / "x").exists()


def shell_script(directory: Path) -> dict[str, Any]:
    script = directory / f"{HARD}.sh"
    script.write_text(f'echo "log $3" > "$3"\nexec {sys.executable} {FAKE_SCRIPT} --port "$2" --seen "$3.seen"\n')
    return {"serverScript": script.name}


def python_script(directory: Path) -> dict[str, Any]:
    binaries = directory / f"venv {HARD}" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(
        f'python3() {{ :; }}; unset -f python3; PATH="{Path(sys.executable).parent}:$PATH"\n'
    )
    script = directory / f"{HARD}.py"
    call = f"import os, sys; os.execv(sys.executable, [sys.executable, {str(FAKE_SCRIPT)!r}, *sys.argv[3:]])"
    script.write_text(f"{call}\n")
    return {"serverScript": script.name}


def any_command(directory: Path) -> dict[str, Any]:
    name = HARD.replace("{port}", "")  # which would be filled in here
    program = directory / name
    program.write_text(f'#!/bin/sh\ntest -d "$2" && exec {sys.executable} {FAKE_SCRIPT} --port "$4"\n')
    program.chmod(0o755)
    return {"command": [f"./{name}", "--model", "{model}", "--port", "{port}"]}


@pytest.mark.parametrize("backend", [shell_script, python_script, any_command])
def test_52_hard_names_for_scripts_and_commands(
    backend: Callable[[Path], dict[str, Any]], hard: Path, hard_launcher: Launcher
) -> None:
    model = build_random(hard / "model of a script")
    block = {"modelPath": str(model), "model": HARD, "port": hard_launcher.port, **backend(hard)}
    configuration = {"pythonVenv": f"venv {HARD}", "backends": {"mlx": block}}
    (hard / ".anyclauderc.json").write_text(json.dumps(configuration))
    options = ("--state-dir", str(hard_launcher.state_dir))
    done = command(*options, "start", "--timeout", "30", cwd=hard)
    assert (done.returncode, done.stderr) == (0, "")
    assert chat(hard_launcher.port, "Hello").text == "Hello"
    assert hard_launcher.status()["listener"] == "lent"
    instance = hard_launcher.state_dir / str(hard_launcher.port)
    if backend is shell_script:
        assert (instance / "script.log").read_text() == f"log {instance / 'script.log'}\n"
        assert json.loads((instance / "script.log.seen").read_text())["model"] == HARD
    assert command(*options, "stop", cwd=hard).returncode == 0
    assert not (hard / "x").exists()
    assert not (instance / "x").exists()


def test_52_the_file_that_init_writes_works_from_anywhere(hard: Path) -> None:
    home = hard.parent / "home"
    home.mkdir()
    model = build_random(hard / "my model")
    done = command("config", "init", "--model", "my model", "--port", str(free_port()), cwd=hard, HOME=str(home))
    assert done.returncode == 0
    block = json.loads((hard / ".anyclauderc.json").read_text())["backends"]["mlx"]
    assert block["modelPath"] == str(model)
    assert block["serverScript"] == str(home / ".anyclaude" / "mlx-launch" / "bin" / "mlx-textgen-server.sh")
    plan = json.loads(command("--json", "plan", cwd=hard, HOME=str(home)).stdout)["data"]
    assert plan["model"]["path"] == str(model)


# -- 55


def missing(file: Path) -> None:
    pass


def a_directory(file: Path) -> None:
    file.mkdir()


def unreadable(file: Path) -> None:
    file.write_text("{}")
    file.chmod(0)


def holding(content: Any) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what: (how it comes about, place, remedy)
    "missing": (missing, "there is no such file", "config init"),
    "a directory": (a_directory, "this is a directory", "--config"),
    "unreadable": (unreadable, "it cannot be read: Permission denied", "Make it readable"),
    "not JSON": (holding(b'{\n "a": 1,\n}'), "line 3, column 1", "trailing commas"),
    "empty": (holding(b""), "line 1, column 1", "JSON"),
    "not UTF-8": (holding(b'{\n"a": "\xff"}'), "line 2 is not UTF-8", "Save it as UTF-8"),
    "10 MB": (holding(b'{"a": "' + b"x" * 10**7 + b'"}'), "10000009 bytes", "right file"),
    "10 MB of brackets": (holding(b"[" * 10**7), "10000000 bytes", "right file"),
    "no object": (holding([]), "an object is wanted, not a list", "backends"),
    "a wrong type": (holding({"backends": {"mlx": {"port": "x"}}}), "backends.mlx.port: a whole number", ""),
    "a wrong type inside": (
        holding({"backends": {"mlx": {"cache": {"cache_slots": "ten"}}}}),
        "backends.mlx.cache.cache_slots: a whole number is wanted, not a text",
        "",
    ),
    "several": (holding({"backends": {"mlx": {"port": 0, "host": 1}}}), "backends.mlx.port", "and 1 more, see"),
    "blocks of no kind": (holding({"backends": [1]}), "backends: an object of backends", "config schema"),
    "a block of no kind": (holding({"backends": {"mlx": 1}}), "backends.mlx: an object is wanted", ""),
    "unknown mode": (holding({"backend": "mlx-textgn"}), "no backend mlx-textgn", "Did you mean mlx-textgen? Known: "),
    "cyclic fallback": (
        holding({"backends": {"mlx": {"fallback": "b"}, "b": {"fallback": "mlx"}}}),
        "backends.b.fallback: the fallbacks go round in a circle: mlx -> b -> mlx",
        "Remove one",
    ),
    "an unknown fallback": (
        holding({"backends": {"mlx": {"fallback": "mlx-legcy"}}}),
        "backends.mlx.fallback: there is no backend mlx-legcy",
        "Did you mean mlx-legacy?",
    ),
    "a port and another": (
        holding({"backends": {"mlx": {"port": 8081, "baseUrl": "http://localhost:8082/v1"}}}),
        "backends.mlx.port: port is 8081 and baseUrl says 8082",
        "Make them the same",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_55_a_configuration_that_cannot_be_used_is_exit_4_with_file_place_and_remedy(what: str, tmp_path: Path) -> None:
    make, place, remedy = BROKEN[what]
    file = tmp_path / "c.json"
    make(file)
    before = psutil.Process().children(recursive=True)
    options = ("--config", str(file), "--state-dir", str(tmp_path / "state"))
    line = one_line(command(*options, "start", "--demo", cwd=tmp_path, unprivileged=True), 4)
    for part in (place, remedy):
        assert part in line
    if what != "unknown mode":
        assert str(file) in line
    assert not (tmp_path / "state" / "8081").exists()
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize("name", [".anyclauderc.json", ".anyclauderc.yaml"])
def test_55_also_where_it_was_found_and_not_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("backends: [")
    options = ("--state-dir", str(tmp_path / "state"))
    assert str(tmp_path / name) in one_line(command(*options, "start", "--demo", cwd=tmp_path), 4)
    assert one_line(command(*options, "run", "--demo", cwd=tmp_path), 4)
    assert command(*options, "config", "validate", cwd=tmp_path).returncode == 4
    assert one_line(command(*options, "status", cwd=tmp_path), 3)  # it needs no configuration
