"""`mlx-launch doctor` on installations that are broken in one way each: that is named, its remedy mends it, and all is well."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.modeldirs import model_directory, write_weights
from support.patient import Patient
from support.pretended import a_status, pretended
from support.waiting import until

from mlx_launcher import system
from mlx_launcher.demo import build_random

SLEEP = [sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def usual(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    patient = Patient(tmp_path_factory.mktemp("healthy"), model)
    patient.get_used_to()
    return patient.usual


@pytest.fixture
def patient(tmp_path: Path, model: Path, usual: list[dict[str, Any]]) -> Patient:
    patient = Patient(tmp_path, model)
    patient.usual = usual
    return patient


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What a test starts, ended when it does."""
    with contextlib.ExitStack() as stack:
        yield stack


Break = Callable[[Patient, contextlib.ExitStack], object]


class Case(NamedTuple):
    """`mend` stands for a remedy that is no command, or one that needs a network; else the remedy itself is run."""

    name: str
    result: str
    words: str
    how: Break
    mend: Callable[[Patient], object] | None = None


def config(text: str) -> Break:
    def write(patient: Patient, _: contextlib.ExitStack) -> None:
        shutil.copy(patient.file, f"{patient.file}.good")
        patient.file.write_text(text)

    return write


def block(**keys: Any) -> Break:
    return lambda patient, _: patient.misconfigure(**keys)


def top(**keys: Any) -> Break:
    return lambda patient, _: patient.misconfigure(keys)


def script(text: str, mode: int = 0o755, name: str = "serve.sh") -> Break:
    """A server script of the user's. Its good form runs."""

    def write(patient: Patient, _: contextlib.ExitStack) -> None:
        file = patient.home / name
        file.write_text(text)
        file.chmod(mode)
        Path(f"{file}.good").write_text("#!/bin/bash\nexec true\n")
        venv = Path(sys.prefix)
        patient.misconfigure({"pythonVenv": str(venv)}, serverScript=str(file))

    return write


def no_venv(patient: Patient, _: contextlib.ExitStack) -> None:
    file = patient.home / "serve.py"
    file.write_text("print()\n")
    file.chmod(0o755)
    patient.configure({"pythonVenv": str(patient.home / "venv")}, serverScript=str(file))


def our_script_gone(patient: Patient, _: contextlib.ExitStack) -> None:
    script = patient.state_dir / "bin" / "mlx-textgen-server.sh"
    patient.configure({"pythonVenv": str(sys.prefix)}, serverScript=str(script))


def command_and_script(patient: Patient, _: contextlib.ExitStack) -> None:
    patient.misconfigure({"pythonVenv": str(sys.prefix)}, command=["true"], serverScript="./none.sh")


def in_model(change: Callable[[Path], object]) -> Break:
    return lambda patient, _: change(patient.model)


def another_model(model_type: str) -> Break:
    def put(patient: Patient, _: contextlib.ExitStack) -> None:
        shutil.rmtree(patient.model)
        model_directory(patient.model, {"model_type": model_type})

    return put


def whole_again(patient: Patient) -> None:
    shutil.rmtree(patient.model, ignore_errors=True)
    build_random(patient.model)


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(1000)


def gguf(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model.gguf")


def huge(model: Path) -> None:
    write_weights(model / "model.safetensors", {"large.weight": ("F16", (10**12 // 2000, 1000))})


def in_config(**numbers: int) -> Break:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **numbers}))

    return in_model(change)


def torn_within(model: Path) -> None:
    """Ends as JSON does, and is none: only who reads it all can tell."""
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes()[:3000] + b"}")


def template(text: str, *, named: bool = False) -> Break:
    def change(model: Path) -> None:
        file = model / "tokenizer_config.json"
        value = [{"name": "default", "template": text}] if named else text
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": value}))
        (model / "chat_template.jinja").unlink(missing_ok=True)

    return in_model(change)


def short(model: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 2048}))


def stranger(patient: Patient, stack: contextlib.ExitStack, host: str = "127.0.0.1") -> None:
    code = f"import socket, time; s = socket.create_server(({host!r}, {patient.port})"
    code += f"{', family=socket.AF_INET6' if ':' in host else ''}); print(1, flush=True); time.sleep(60)"
    started(stack, [sys.executable, "-S", "-c", code])


def started(stack: contextlib.ExitStack, command: list[str]) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    stack.enter_context(process.stdout)
    process.stdout.readline()
    return process


def open_state(patient: Patient, _: contextlib.ExitStack) -> None:
    patient.state_dir.chmod(0o755)


def open_state_of_others(patient: Patient, stack: contextlib.ExitStack) -> None:
    open_state(patient, stack)
    (patient.state_dir / "letters").touch()


def open_log(patient: Patient, _: contextlib.ExitStack) -> None:
    log = patient.instance / "server.log"
    log.write_text("")
    log.chmod(0o644)
    patient.instance.chmod(0o755)


def log_is_a_directory(patient: Patient, _: contextlib.ExitStack) -> None:
    (patient.instance / "server.log").mkdir(mode=0o755)


def open_cache(patient: Patient, _: contextlib.ExitStack) -> None:
    (patient.state_dir / "kvcache").mkdir()
    (patient.state_dir / "kvcache").chmod(0o777)


def linked_log(patient: Patient, _: contextlib.ExitStack) -> None:
    (patient.instance / "server.log").symlink_to(patient.home / "elsewhere")


def linked_state(patient: Patient, _: contextlib.ExitStack) -> None:
    elsewhere = patient.home / "another disk"
    patient.state_dir.rename(elsewhere)
    patient.state_dir.symlink_to(elsewhere)


def no_directory(patient: Patient, _: contextlib.ExitStack) -> None:
    shutil.rmtree(patient.state_dir)
    patient.state_dir.write_text("")


def remember(patient: Patient, server: dict[str, Any] | None, state: str = "ready") -> None:
    status = a_status(patient.port, str(patient.model), state=state, last_error="it crashed too often")
    text = json.dumps({"schema": 1, "pid": 4194303, "pid_started": 1.0, "server": server, "status": status})
    file = patient.instance / "state.json"
    file.write_text(text)
    file.chmod(0o600)


def orphan(patient: Patient, stack: contextlib.ExitStack) -> None:
    process = started(stack, SLEEP)
    remember(patient, {"pid": process.pid, "started": system.process_started(process.pid)})


def killed(patient: Patient, _: contextlib.ExitStack) -> None:
    remember(patient, None)


def gave_up(patient: Patient, _: contextlib.ExitStack) -> None:
    remember(patient, None, "failed")


def torn_state(patient: Patient, _: contextlib.ExitStack) -> None:
    remember(patient, None)
    truncate(patient.instance / "state.json")
    (patient.instance / "state.json").write_text("{")


def stale_socket(patient: Patient, _: contextlib.ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(patient.instance / "control.sock"))
    (patient.instance / "control.sock").chmod(0o600)


def half_written(patient: Patient, _: contextlib.ExitStack) -> None:
    ours, others = (patient.state_dir / "kvcache" / name for name in ("a" * 16, "of somebody else's"))
    for folder in (ours, others):
        folder.mkdir(parents=True)
        folder.parent.chmod(0o700)
        (folder / ".partial-4194303-entry.safetensors").write_text("")
    (ours / ".lock").touch()


def cache_is_a_file(patient: Patient, _: contextlib.ExitStack) -> None:
    (patient.state_dir / "kvcache").write_text("")


def degraded(patient: Patient, stack: contextlib.ExitStack) -> None:
    rollback = {"from": "mlx", "to": "mlx-legacy", "at": "", "reason": "it crashed in a loop", "automatic": True}
    changes = {"state": "degraded", "backend": "mlx-legacy", "rollback": rollback}
    stack.enter_context(pretended(patient.state_dir, patient.port, str(patient.model), **changes))
    private(patient)


def private(patient: Patient) -> None:
    """The modes with which a real supervisor makes what a pretended one has made."""
    for name in ("lock", "control.sock"):
        (patient.instance / name).chmod(0o600)


CASES = {
    "not JSON": Case("configuration", "failed", "line 1, column 13", config('{"backend": }')),
    "no file of that name": Case(
        "configuration",
        "failed",
        "there is no such file",
        lambda patient, _: patient.environment.update(MLX_LAUNCH_CONFIG=str(patient.home / "other.json")),
        lambda patient: patient.environment.pop("MLX_LAUNCH_CONFIG"),
    ),
    "an unknown key": Case("configuration", "warning", "Did you mean maxQueue?", block(maxQeue=3)),
    "a wrong type": Case("configuration", "failed", "backends.mlx.maxQueue", block(maxQueue="many")),
    "a port and another": Case("configuration", "failed", "baseUrl says 1", block(baseUrl="http://localhost:1/v1")),
    "an unknown mode": Case("configuration", "failed", "Did you mean mlx-textgen?", top(backend="mlx-textgn")),
    "a fallback that is none": Case("configuration", "failed", "no backend mlx-legcy", block(fallback="mlx-legcy")),
    "a variable": Case(
        "configuration",
        "failed",
        "environment MLX_URL: this is no http URL",
        lambda patient, _: patient.environment.update(MLX_URL="ftp://here"),
    ),
    "a script that is not there": Case("scripts", "failed", "there is no script", block(serverScript="./none.sh")),
    "a script that may not be run": Case("scripts", "warning", "is not executable", script("exec true\n", 0o644)),
    "a script that does not parse": Case("scripts", "failed", "unexpected end of file", script("if true; then\n")),
    "no virtual environment": Case("scripts", "failed", "there is no bin/activate in it", no_venv),
    "our script is gone": Case("scripts", "warning", "but anyclaude does", our_script_gone),
    "a script that anyclaude alone would run": Case(
        "scripts", "warning", "mlx-launch does without it", command_and_script, lambda patient: patient.configure()
    ),
    "no model": Case("model", "failed", "there is no model at", in_model(shutil.rmtree), whole_again),
    "torn weights": Case(
        "model", "failed", "is torn", in_model(lambda path: truncate(path / "model.safetensors")), whole_again
    ),
    "no tokenizer": Case(
        "model", "failed", "no tokenizer.json", in_model(lambda path: (path / "tokenizer.json").unlink()), whole_again
    ),
    "a torn tokenizer": Case(
        *("model", "failed", "tokenizer.json is torn"),
        in_model(lambda path: truncate(path / "tokenizer.json")),
        whole_again,
    ),
    "a tokenizer that is torn within": Case(
        "model", "failed", "tokenizer.json cannot be read: ", in_model(torn_within), whole_again
    ),
    "a template that is none": Case(
        "model", "failed", "tokenizer_config.json cannot be read: line 2: ", template("\n{% if %}"), whole_again
    ),
    "a template by name that is none": Case(
        "model", "failed", "tokenizer_config.json cannot be read: line 1: ", template("{{ x", named=True), whole_again
    ),
    "a template file that is none": Case(
        *("model", "failed", "chat_template.jinja cannot be read: line 1: "),
        in_model(lambda path: (path / "chat_template.jinja").write_text("{% endif %}")),
        whole_again,
    ),
    "more layers than there are": Case(
        "model",
        "failed",
        "says num_hidden_layers 5, and the weights have 4",
        in_config(num_hidden_layers=5),
        whole_again,
    ),
    "weights of another size": Case(
        "model", "failed", "says hidden_size 64, and the weights have 128", in_config(hidden_size=64), whole_again
    ),
    "other heads than there are": Case(
        "model", "failed", "says heads of keys 4, and the weights have 2", in_config(num_key_value_heads=4), whole_again
    ),
    "another format": Case("model", "failed", "GGUF", in_model(gguf), whole_again),
    "an unknown architecture": Case("model", "failed", "architecture bert", another_model("bert"), whole_again),
    "a model for the other backend": Case(
        "model", "warning", "mlx-textgen cannot serve", another_model("deepseek_v41"), whole_again
    ),
    "a short context": Case("model", "warning", "context 2,048 tokens", in_model(short), whole_again),
    "a model larger than memory": Case("memory", "failed", "1000.0 GB of weights", in_model(huge), whole_again),
    "no key where others reach it": Case("start", "failed", "no API key is set", block(host="0.0.0.0")),
    "a program that is not there": Case("start", "failed", "there is no program nothing", block(command="nothing")),
    "a stranger on the port": Case("port", "failed", "time.sleep(60)", stranger),
    "a stranger on ::1": Case("port", "failed", "on ::1 is taken by", lambda p, s: stranger(p, s, "::1")),
    "an address of another machine": Case(
        "port",
        "failed",
        "192.0.2.1 is no address of this machine",
        lambda patient, _: patient.misconfigure(host="192.0.2.1", apiKey="a key"),
        lambda patient: patient.configure(),
    ),
    "an open state directory": Case("state directory", "warning", "mode 0755", open_state),
    "an open state directory with other things in it": Case(
        "state directory",
        "failed",
        "holds more than our state",
        open_state_of_others,
    ),
    "an open log": Case("state directory", "warning", "and 1 more: open to others", open_log),
    "a directory for a log": Case("state directory", "warning", "server.log: a directory, where", log_is_a_directory),
    "a KV cache that is open": Case("state directory", "warning", "kvcache: open to others", open_cache),
    "a link for a log": Case("state directory", "warning", "a link", linked_log),
    "a link for a state directory": Case("state directory", "warning", "is a link to", linked_state),
    "a file for a state directory": Case("state directory", "failed", "is no directory", no_directory),
    "a server without its supervisor": Case("leftovers", "failed", "still runs", orphan),
    "a killed supervisor": Case("leftovers", "warning", "was killed, and nothing of it runs", killed),
    "a torn state": Case("leftovers", "warning", "cannot be read", torn_state),
    "a socket of nobody": Case("leftovers", "warning", "belongs to nobody", stale_socket),
    "a half-written entry": Case("leftovers", "warning", "half written", half_written),
    "a file for a cache": Case("disk", "warning", "is no directory: the KV cache is not kept", cache_is_a_file),
    "a server that gave up": Case(
        "server", "warning", "it crashed too often", gave_up, lambda p: (p.instance / "state.json").unlink()
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_what_is_broken_is_named_and_its_remedy_mends_it(
    what: str,
    patient: Patient,
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[what]
    monkeypatch.chdir(patient.home)
    case.how(patient, stack)
    (found,) = patient.findings_here(monkeypatch, capsys)
    assert (found["name"], found["result"]) == (case.name, case.result)
    assert case.words in found["found"]
    assert found["remedy"], found
    if case.mend is not None:
        case.mend(patient)
    elif found["remedy"].startswith(("export ", "unset ")):
        # It lives as long as the shell that it was typed into.
        assert patient.findings(f"{found['remedy']}; mlx-launch doctor --json") == []
        return
    else:
        done = patient.run(found["remedy"])
        assert done.returncode == 0, done.stderr
    until(lambda: not patient.findings_here(monkeypatch, capsys), 10, "health")


def test_a_healthy_installation_says_so(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert patient.findings_here(monkeypatch, capsys) == []


def test_what_scripts_depend_on(patient: Patient) -> None:
    envelope = json.loads(patient.run("mlx-launch doctor --json").stdout)
    assert (envelope["schema"], envelope["command"], envelope["ok"], envelope["errors"]) == (1, "doctor", True, [])
    assert list(envelope["data"]) == ["checks"]
    for check in envelope["data"]["checks"]:
        assert list(check) == ["name", "result", "found", "remedy"]
        assert check["result"] in ("ok", "warning", "failed", "skipped")
    patient.file.write_text("{")
    done = patient.run("mlx-launch doctor --json")
    (error,) = json.loads(done.stdout)["errors"]
    assert (done.returncode, error["code"], done.stderr.count("\n")) == (1, "checks_failed", 1)
    assert error["message"].endswith("is a failure: configuration")


def test_a_mode_that_needs_no_server(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patient.configure({"backend": "claude"})
    assert patient.findings_here(monkeypatch, capsys) == []


def test_a_server_that_gave_up_is_started_with_its_own_file(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gave_up(patient, contextlib.ExitStack())
    file = patient.instance / "state.json"
    for config, words in ((str(patient.file), ["mlx-launch"]), ("/my rc.json", ["MLX_LAUNCH_CONFIG=/my rc.json"])):
        state = json.loads(file.read_text())
        state["status"]["config"] = config
        file.write_text(json.dumps(state))
        (found,) = patient.findings_here(monkeypatch, capsys)
        assert shlex.split(found["remedy"])[:1] == words


def test_a_server_on_the_fallback(
    patient: Patient,
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(patient.home)
    degraded(patient, stack)
    (found,) = patient.findings_here(monkeypatch, capsys)
    assert (found["name"], found["result"]) == ("server", "warning")
    assert "is on mlx-legacy instead of mlx: it crashed in a loop" in found["found"]
    assert found["remedy"] == f"mlx-launch restart --port {patient.port}"


ACTIVITY = {"in_flight": 0, "queued": 0, "requests": 6, "prompt_tokens": 108_000, "cached_tokens": 0}


@pytest.mark.parametrize(
    ("activity", "warned"),
    [
        ({}, True),
        ({"cached_tokens": 90_000}, False),
        ({"requests": 4}, False),
        ({"prompt_tokens": 600}, False),
    ],
)
def test_prompts_that_share_nothing_are_a_billing_header(
    activity: dict[str, int],
    warned: bool,
    patient: Patient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(patient.home)
    did = {**ACTIVITY, **activity, "completion_tokens": 0, "idle_s": 0.0}
    with pretended(patient.state_dir, patient.port, str(patient.model), activity=did):
        private(patient)
        found = patient.findings_here(monkeypatch, capsys)
    names = [(check["name"], check["result"], check["remedy"]) for check in found]
    assert names == ([("cache hits", "warning", "export CLAUDE_CODE_ATTRIBUTION_HEADER=0")] if warned else [])


def test_our_own_server_on_the_port_is_no_stranger(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(patient.home)
    with (
        socket.create_server(("127.0.0.1", patient.port)),
        pretended(patient.state_dir, patient.port, str(patient.model)),
    ):
        private(patient)
        assert patient.findings_here(monkeypatch, capsys) == []


def test_flags_are_examined_and_come_back_in_the_remedy(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_directory(patient.home / "v 41", {"model_type": "deepseek_v41"})
    (found,) = patient.findings_here(monkeypatch, capsys, f"--model={model}")
    words = shlex.split(found["remedy"])
    assert Path(words[0]).name == "mlx-launch"
    assert words[1:] == ["start", f"--model={model}", "--mode=mlx-legacy"]
    (found,) = patient.findings_here(monkeypatch, capsys, "--model=org/none")
    assert (found["name"], found["result"]) == ("model", "warning")
    assert "is not on this machine yet" in found["found"]
