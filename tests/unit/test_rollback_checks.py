"""What `rollback --check` finds, and what it must not mistake for a fault."""

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.backends import checks, scan
from mlx_launcher.backends.checks import Check, Target
from mlx_launcher.cli import main
from mlx_launcher.config import first, shipped
from mlx_launcher.demo import build_random
from mlx_launcher.models import fit
from mlx_launcher.system.memory import Memory

HEX = "0123456789abcdef0123456789abcdef"


def made(target: Target, state_dir: Path) -> dict[str, Check]:
    return {check.name: check for check in checks.check_target(target, state_dir)}


def failed(target: Target, state_dir: Path) -> set[str]:
    return {name for name, check in made(target, state_dir).items() if not check.ok}


def a_script(path: Path, text: str, mode: int = 0o755) -> Target:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    path.chmod(mode)
    return Target("mine", path, str(path), None, None if path.suffix == ".sh" else sys.executable)


@pytest.fixture
def ours(tmp_path: Path) -> Target:
    """The built-in legacy server's script, not installed yet."""
    text = first.script_text(tmp_path, True, "mlx-server.py")
    path = first.script_path(tmp_path, "mlx-server.py")
    return Target("mlx-legacy", path, str(path), text, sys.executable)


def test_ours_is_right_before_and_after_it_is_installed(ours: Target, tmp_path: Path) -> None:
    assert failed(ours, tmp_path) == set()
    assert not ours.script.exists()
    first.install_script(tmp_path, True, "mlx-server.py")
    assert failed(ours, tmp_path) == set()
    assert os.access(ours.script, os.X_OK)


def test_ours_that_was_changed_is_refused(ours: Target, tmp_path: Path) -> None:
    first.install_script(tmp_path, True, "mlx-server.py")
    ours.script.write_text(ours.script.read_text() + "# mine\n")
    found = made(ours, tmp_path)["unchanged"]
    assert not found.ok
    assert "installs it anew" in found.hint


def test_a_package_that_was_changed_is_refused(ours: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_as_recorded", lambda: False)
    assert failed(ours, tmp_path) == {"unchanged"}


def test_the_hash_in_the_package_s_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip leaves one, with the script and its hash."""
    import base64
    import hashlib

    data = shipped.read_text("scripts", "mlx-server.py").encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    script = tmp_path / "mlx_launcher" / "share" / "scripts" / "mlx-server.py"
    script.parent.mkdir(parents=True)
    script.write_bytes(data)
    info = tmp_path / "mlx_launcher-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-launcher\nVersion: 9\n")
    (info / "RECORD").write_text(f"mlx_launcher/share/scripts/mlx-server.py,sha256={digest},{len(data)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert checks._as_recorded()
    script.write_bytes(data + b"#")
    assert not checks._as_recorded()


@pytest.mark.parametrize("suffix", [".sh", ".py"])
def test_a_script_of_the_user_s_own_that_is_right(tmp_path: Path, suffix: str) -> None:
    text = "#!/bin/bash\nexec true\n" if suffix == ".sh" else "import json\nimport psutil\n"
    target = a_script(tmp_path / f"mine{suffix}", text)
    assert failed(target, tmp_path / "state") == set()


@pytest.mark.parametrize("suffix", [".sh", ".py"])
def test_a_locale_that_is_not_installed_is_no_fault_of_a_script(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    assert failed(a_script(tmp_path / f"mine{suffix}", "import json\n" * (suffix == ".py")), tmp_path) == set()


def test_a_script_that_is_missing_a_directory_or_not_executable(tmp_path: Path) -> None:
    target = a_script(tmp_path / "mine.sh", "true\n", 0o644)
    assert failed(target, tmp_path) == {"permissions"}
    target.script.unlink()
    assert failed(target, tmp_path) == {"script"}
    target.script.mkdir()
    assert failed(target, tmp_path) == {"script"}
    assert failed(target._replace(script=target.script / "below" / "it"), tmp_path) == {"script"}


@pytest.mark.parametrize(("name", "text"), [("mine.sh", "if true; then\n"), ("mine.py", "def broken(:\n")])
def test_a_script_that_does_not_parse(tmp_path: Path, name: str, text: str) -> None:
    assert failed(a_script(tmp_path / name, text), tmp_path) == {"syntax"}


def test_an_interpreter_that_is_missing_and_imports_that_are(tmp_path: Path) -> None:
    text = (
        "import nowhere_to_be_found\nimport mine_beside\ntry:\n    import optional_one\nexcept ImportError:\n    pass\n"
    )
    target = a_script(tmp_path / "mine.py", text)
    (tmp_path / "mine_beside.py").touch()
    found = made(target, tmp_path)
    assert [name for name, check in found.items() if not check.ok] == ["imports"]
    assert found["imports"].message.endswith("cannot import nowhere_to_be_found")
    assert failed(target._replace(python=str(tmp_path / "no" / "python3")), tmp_path) == {"interpreter"}


@pytest.mark.parametrize(
    "line",
    [
        "export OPENAI=sk-abcdefghijklmnop1234",
        'login("hf_abcdefghijklmnopqrst")',
        f'API_KEY="{HEX}"',
        f"export MY_SECRET={HEX}",
        f'{{"token": "{HEX}"}}',
        "password = 'aGVsbG8gd29ybGQ0NTY3ODkwMTIzNDU2Nzg5MA=='",
        f'headers = {{"Authorization": "x", "auth": "Bearer {HEX}"}}',
    ],
)
def test_what_looks_like_a_key_is_found_and_not_shown(line: str, tmp_path: Path) -> None:
    assert scan.secrets(f"#!/bin/bash\n{line}\n") == ["line 2 holds what looks like a key"]


@pytest.mark.parametrize(
    "line",
    [
        'api_key = os.environ["OPENAI_API_KEY_OF_THE_SERVER_1234"]',
        "TOKENIZER_PATH=/Users/somebody/models/2024/11/22/tokenizer",
        "max_tokens=4096",
        f'revision = "{HEX}"',
        'token="$HF_TOKEN"',
        "token: tokenizer_of_the_model_that_is_loaded",
        'parser.add_argument("--api-key", default="")',
    ],
)
def test_what_is_no_key(line: str) -> None:
    assert scan.secrets(line) == []


def test_our_own_scripts_have_nothing_to_find() -> None:
    for name in ("mlx-textgen-server.sh", "mlx-server.py"):
        assert scan.secrets(shipped.read_text("scripts", name)) == []
    assert scan.shell_writes(shipped.read_text("scripts", "mlx-textgen-server.sh"), []) == []
    assert scan.python_writes(ast.parse(shipped.read_text("scripts", "mlx-server.py")), []) == []


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("echo x > /etc/passwd", "/etc/passwd"),
        ("echo x >>'/var/log/a b'", "/var/log/a b"),
        ("exec 2>/var/x", "/var/x"),
        ("true &>/var/x", "/var/x"),
        ("true | tee -a /var/x", "/var/x"),
        ("cd /; rm -rf /opt/x", "/opt/x"),
        ('echo x > "$HOME/.bashrc"', "$HOME/.bashrc"),
    ],
)
def test_a_shell_script_that_writes_elsewhere(line: str, path: str, tmp_path: Path) -> None:
    assert scan.shell_writes(f"#!/bin/bash\n{line}\n", [tmp_path]) == [f"line 2 writes to {path}"]


def test_a_shell_script_that_writes_where_it_may(tmp_path: Path) -> None:
    text = f'# > /etc/x\necho x >/dev/null 2>&1\necho x > "{tmp_path}/log"\necho > "$LOG"\ncat < /etc/hosts\nmkdir -p logs\n'
    assert scan.shell_writes(text, [tmp_path]) == []


@pytest.mark.parametrize(
    "call",
    [
        'open("/etc/x", "w")',
        'open("/etc/x", mode="ab")',
        'Path("/etc/x").write_text("y")',
        'Path("/etc/x").open("w")',
        'os.makedirs("/etc/x")',
        'shutil.rmtree("/etc/x")',
        'open(os.path.expanduser("/etc/x"), "x")',
    ],
)
def test_a_python_script_that_writes_elsewhere(call: str, tmp_path: Path) -> None:
    assert scan.python_writes(ast.parse(f"\n{call}"), [tmp_path]) == ["line 2 writes to /etc/x"]


@pytest.mark.parametrize(
    "call",
    ['open("/etc/x")', 'open("here", "w")', 'Path("/etc/x").read_text()', '"/etc/x".replace("/", "")', "open(f, 'w')"],
)
def test_a_python_script_that_writes_where_it_may(call: str, tmp_path: Path) -> None:
    assert scan.python_writes(ast.parse(call), [tmp_path]) == []


# -- the command


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")):
            monkeypatch.delenv(name)
    build_random(tmp_path / "model")
    return tmp_path


def run(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["--state-dir", str(root / "state"), "rollback", "--check", "--json", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_the_command_shows_each_and_changes_nothing(surroundings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = surroundings / ".anyclauderc.json"
    file.write_text('{"backends": {"mlx": {"modelPath": "model"}}}')
    before = sorted(surroundings.rglob("*"))
    code, envelope = run(surroundings, capsys)
    assert (code, envelope["ok"]) == (0, True)
    names = [check["name"] for check in envelope["data"]["checks"]]
    wanted = "script syntax unchanged secrets writes interpreter imports configuration model"
    assert names == wanted.split()
    assert sorted(surroundings.rglob("*")) == before


def test_a_model_that_is_torn_and_a_file_that_contradicts_itself(
    surroundings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = surroundings / ".anyclauderc.json"
    blocks = {"mlx": {"modelPath": "model"}, "other": {"port": 1, "baseUrl": "http://localhost:2/v1"}}
    file.write_text(json.dumps({"backend": "mlx", "backends": blocks}))
    (surroundings / "model" / "tokenizer.json").unlink()
    code, envelope = run(surroundings, capsys)
    bad = [check["name"] for check in envelope["data"]["checks"] if not check["ok"]]
    assert (code, bad) == (1, ["configuration", "model"])
    assert envelope["errors"][0]["code"] == "check_failed"


@pytest.mark.parametrize(("bytes_", "fits"), [(1000, False), (10**12, True)])
def test_what_several_machines_hold_may_be_too_much_for_one(
    surroundings: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bytes_: int,
    fits: bool,
) -> None:
    monkeypatch.setattr(fit, "model_memory", lambda: Memory(bytes_, "all of it"))
    block = {"modelPath": "model", "distributed": {"peers": [{"host": "127.0.0.1"}]}}
    (surroundings / ".anyclauderc.json").write_text(
        json.dumps({"backend": "mlx-cluster", "backends": {"mlx-cluster": block}})
    )
    code, envelope = run(surroundings, capsys)
    found = {check["name"]: check for check in envelope["data"]["checks"]}
    assert (code, found["memory"]["ok"]) == (0 if fits else 1, fits)
    assert fits or "this machine has 0.0 GB for it (all of it)" in found["memory"]["message"]


def test_all_of_a_script_s_checks(surroundings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = a_script(
        surroundings / "mine.py", f'import nowhere_to_be_found\nKEY="{HEX}"\nopen("/etc/x", "w")\n', 0o644
    )
    block = {"modelPath": "model", "fallback": "mine"}
    file = {"pythonVenv": sys.prefix, "backends": {"mlx": block, "mine": {"serverScript": "mine.py"}}}
    (surroundings / ".anyclauderc.json").write_text(json.dumps(file))
    code, envelope = run(surroundings, capsys)
    bad = [check["name"] for check in envelope["data"]["checks"] if not check["ok"]]
    assert (code, bad) == (1, ["permissions", "secrets", "writes", "imports"])
    assert envelope["data"]["script"] == str(target.script)
    assert HEX not in json.dumps(envelope)
