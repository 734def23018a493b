"""`mlx-launch rollback`: what it does in which order, what it writes, and what it leaves alone."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from support.pretended import Pretended, pretended

from mlx_launcher.cli import main, rollback, rollback_switch
from mlx_launcher.config import edit, first
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError

PORT = 18499
TEXT = """{
    "// mine": "é \\u00e9 - stays",
    "backend": "mlx",
    "backends": {
        "mlx":   { "port": PORT, "modelPath": "model" SCRIPT },
        "other": { "serverScript": "x" }
    }
}
"""


class World:
    """A directory with a configuration and a model, and the command in it."""

    def __init__(self, root: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.state_dir = root / "state"
        self.file = root / ".anyclauderc.json"
        self.model = model
        self.legacy = self.state_dir / "bin" / "mlx-server.py"
        self._capsys = capsys

    def write(self, script: str | None = None) -> str:
        key = "" if script is None else f', "serverScript": {json.dumps(script)}'
        text = TEXT.replace("PORT", str(PORT)).replace("SCRIPT", key)
        self.file.write_text(text)
        return text

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["--state-dir", str(self.state_dir), "rollback", *arguments])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        assert "unexpected" not in err
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    def json(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self(*arguments, "--json")[1]))

    def now(self) -> str:
        return self.file.read_text()

    def script(self) -> Any:
        return json.loads(self.now())["backends"]["mlx"].get("serverScript")


@pytest.fixture
def world(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("MLX_", "LOCAL_", "VLLM_MLX_", "ANYCLAUDE_")):
            monkeypatch.delenv(name)
    build_random(tmp_path / "model")
    return World(tmp_path, tmp_path / "model", capsys)


@pytest.fixture
def server(world: World) -> Iterator[Pretended]:
    with pretended(world.state_dir, PORT, str(world.model)) as supervisor:
        yield supervisor


# -- nothing runs


@pytest.mark.parametrize("script", [None, "scripts/mlx-textgen-server.sh"])
def test_nothing_runs_there_and_back(world: World, script: str | None) -> None:
    old = world.write(script)
    code, out, err = world("--yes")
    assert (code, err) == (0, "")
    assert world.script() == str(world.legacy)
    assert world.legacy.read_text() == first.script_text(world.state_dir, True, "mlx-server.py")
    assert "the next start uses it" in out
    raw = edit.raw_value(world.now(), ("backends", "mlx", "serverScript"))
    added = f', "serverScript": {raw}'
    assert world.now() == TEXT.replace("PORT", str(PORT)).replace(
        " SCRIPT", f"{added} " if script is None else f" {added}"
    )
    assert [backup.read_text() for backup in edit.backups(world.file)] == [old]
    assert world("--undo", "--yes")[0] == 0
    assert world.now() == old


def test_undo_puts_back_the_key_alone_where_the_file_was_changed_since(world: World) -> None:
    world.write()
    world("--yes")
    world.file.write_text(world.now().replace("- stays", "- is new"))
    assert world("--undo", "--yes")[0] == 0
    assert world.now() == TEXT.replace("PORT", str(PORT)).replace(" SCRIPT", " ").replace("- stays", "- is new")


def test_undo_without_a_backup_says_what_to_do(world: World) -> None:
    world.write()
    world("--yes")
    for backup in edit.backups(world.file):
        backup.unlink()
    code, _, err = world("--undo", "--yes")
    assert code == 1
    assert "by hand" in err
    assert world.script() == str(world.legacy)


def test_undo_of_nothing(world: World) -> None:
    old = world.write()
    assert world("--undo", "--yes")[0] == 1
    assert world.now() == old


def test_there_already(world: World) -> None:
    world.write()
    world("--yes")
    text = world.now()
    code, out, _ = world("--yes")
    assert (code, world.now()) == (0, text)
    assert "already" in out
    assert len(edit.backups(world.file)) == 1


def test_without_a_terminal_yes_is_needed(world: World) -> None:
    old = world.write()
    for arguments in ((), ("--json",), ("--undo",)):
        assert world(*arguments)[0] in (1, 2)
    assert "--yes" in world()[2]
    assert world.now() == old
    assert not world.legacy.exists()


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 1)])
def test_on_a_terminal_it_asks(world: World, monkeypatch: pytest.MonkeyPatch, answer: bool, code: int) -> None:
    old = world.write()
    asked: list[str] = []
    monkeypatch.setattr(rollback, "_is_terminal", lambda: True)

    def confirm(text: str, **_: object) -> bool:
        asked.append(text)
        return answer

    monkeypatch.setattr(click, "confirm", confirm)
    ended, _, err = world()
    assert (ended, asked) == (code, ["Go on?"])
    assert f"changes from nothing to {json.dumps(str(world.legacy))}" in err
    assert (world.now() == old) != answer


def test_options_that_exclude_each_other(world: World) -> None:
    world.write()
    assert world("--undo", "--check")[0] == 2
    assert world("--undo", "--to", "mlx-legacy")[0] == 2


def test_yaml_is_not_edited_and_the_change_is_printed(world: World) -> None:
    file = world.root / ".anyclauderc.yaml"
    file.write_text("backends:\n  mlx: {modelPath: model}\n")
    code, out, _ = world("--yes")
    assert code == 0
    assert f"set backends.mlx.serverScript to {json.dumps(str(world.legacy))} by hand" in out
    assert file.read_text() == "backends:\n  mlx: {modelPath: model}\n"
    assert list(world.root.glob("*.bak")) == []
    assert world.legacy.exists()


def test_a_command_is_left_alone(world: World) -> None:
    world.file.write_text('{"backends": {"mlx": {"modelPath": "model", "command": "true"}}}')
    code, out, _ = world("--yes")
    assert code == 0
    assert "command decides" in out
    assert "serverScript" not in world.now()


def test_to_a_backend_with_a_script_of_its_own_and_back(world: World) -> None:
    (world.root / "mine.sh").write_text("#!/bin/bash\nexec true\n")
    (world.root / "mine.sh").chmod(0o755)
    old = world.write().replace('"serverScript": "x"', '"serverScript": "mine.sh"')
    world.file.write_text(old)
    assert world("--to", "other", "--yes")[0] == 0
    assert world.script() == "mine.sh"
    assert world("--undo", "--yes")[0] == 0
    assert world.now() == old


@pytest.mark.parametrize("to", ["claude", "nonsense", "mlx"])
def test_to_what_is_no_target(world: World, to: str) -> None:
    old = world.write()
    assert world("--to", to, "--yes")[0] in (1, 4)
    assert world.now() == old


def test_no_fallback_needs_a_name(world: World) -> None:
    world.file.write_text('{"backends": {"mlx": {"modelPath": "model", "fallback": null}}}')
    assert "--to" in world("--yes")[2]
    assert world("--to", "mlx-legacy", "--yes")[0] == 0
    assert world.script() == str(world.legacy)


def test_away_from_a_script_that_is_gone(world: World) -> None:
    old = world.write("gone.sh")
    assert world("--yes")[0] == 0
    assert world.script() == str(world.legacy)
    assert world("--undo", "--yes")[0] == 0
    assert world.now() == old


# -- a server runs


def test_the_file_is_that_which_the_server_was_started_with(world: World, server: Pretended) -> None:
    old = world.write()
    other = world.file.rename(world.root / "idle.json")
    server.status["config"] = str(other)
    done = world.json("--port", str(PORT), "--yes")["data"]
    assert (done["switched"], done["edited"], done["file"]) == (True, True, str(other))
    assert json.loads(other.read_text())["backends"]["mlx"]["serverScript"] == str(world.legacy)
    assert world("--port", str(PORT), "--undo", "--yes")[0] == 0
    assert other.read_text() == old
    here = world.write()  # found where the command runs, and another server's
    assert world.json("--yes")["data"]["file"] == str(other)
    assert world.now() == here


def test_another_file_is_taken_where_it_is_named_or_the_servers_is_gone(world: World, server: Pretended) -> None:
    world.write()
    server.status["config"] = str(world.root / "gone.json")
    assert world.json("--yes")["data"]["file"] == str(world.file)
    (world.root / "broken.json").write_text("{")
    server.status["config"] = str(world.root / "broken.json")
    with pytest.raises(SystemExit) as ended:
        main(["--state-dir", str(world.state_dir), "--no-config", "rollback", "--undo", "--yes"])
    assert ended.value.code == 0


def test_the_server_goes_first_and_the_file_follows(world: World, server: Pretended) -> None:
    old = world.write()
    server.before_outcome = lambda: seen.append(world.now())
    seen: list[str] = []
    code, out, err = world("--yes")
    assert (code, err) == (0, "")
    assert seen == [old]
    assert server.asked == [{"do": "switch", "to": "fallback", "reason": "mlx-launch rollback", "automatic": False}]
    assert world.script() == str(world.legacy)
    assert f"mlx-legacy serves at http://127.0.0.1:{PORT}/v1." in out.splitlines()
    assert world("--undo", "--yes")[0] == 0
    assert server.asked[-1]["to"] == "configured"
    assert (world.now(), seen[-1]) == (old, seen[-1])
    assert json.loads(seen[-1])["backends"]["mlx"]["serverScript"] == str(world.legacy)


def test_json(world: World, server: Pretended) -> None:
    world.write()
    envelope = world.json("--yes")
    data = envelope["data"]
    assert (envelope["ok"], data["from"], data["to"], data["switched"], data["edited"]) == (
        True,
        "mlx",
        "mlx-legacy",
        True,
        True,
    )
    assert data["key"] == "backends.mlx.serverScript"
    assert (data["before"], data["after"]) == (None, json.dumps(str(world.legacy)))
    assert Path(data["backup"]).exists()


def test_a_target_that_does_not_prove_itself_changes_nothing(world: World, server: Pretended) -> None:
    old = world.write()
    server.outcome, server.reason = "reverted", "The weights are torn."
    code, _, err = world("--yes")
    assert code == 1
    assert "mlx-legacy did not come up: The weights are torn; mlx serves again; no file was changed" in err
    assert world.now() == old
    assert edit.backups(world.file) == []


def test_refused_by_the_supervisor(world: World, server: Pretended) -> None:
    old = world.write()
    server.outcome, server.reason = "refused", "there is no fallback"
    code, _, err = world("--yes")
    assert (code, world.now()) == (1, old)
    assert "there is no fallback" in err


def test_rolled_back_by_itself_already(world: World, server: Pretended) -> None:
    world.write()
    server.status.update(state="degraded", backend="mlx-legacy", rollback={"from": "mlx", "to": "mlx-legacy"})
    assert world("--yes")[0] == 0
    assert server.asked == []
    assert world.script() == str(world.legacy)


def test_a_fallback_that_has_not_proved_itself_yet_is_not_written(world: World, server: Pretended) -> None:
    old = world.write()
    server.status.update(state="restarting", backend="mlx-legacy", rollback={"from": "mlx", "to": "mlx-legacy"})
    server.outcome, server.reason = "reverted", "It is torn."
    assert world("--yes")[0] == 1
    assert world.now() == old


def test_undo_of_an_automatic_rollback_changes_no_file(world: World, server: Pretended) -> None:
    old = world.write()
    server.status.update(state="degraded", backend="mlx-legacy", rollback={"from": "mlx", "to": "mlx-legacy"})
    assert world("--undo", "--yes")[0] == 0
    assert server.asked[-1]["to"] == "configured"
    assert world.now() == old


def test_undo_of_what_was_started_from_the_rolled_back_file(world: World) -> None:
    old = world.write()
    world("--yes")
    with pretended(world.state_dir, PORT, str(world.model)) as server:
        assert world("--undo", "--yes")[0] == 0
        assert [request["do"] for request in server.asked] == ["restart"]
    assert world.now() == old


def test_undo_that_does_not_come_up_puts_the_file_back(world: World) -> None:
    world.write()
    world("--yes")
    rolled_back, kept = world.now(), edit.backups(world.file)
    with pretended(world.state_dir, PORT, str(world.model)) as server:
        server.outcome, server.reason = "reverted", "It is torn."
        code, _, err = world("--undo", "--yes")
    assert code == 1
    assert "is again what it was" in err
    assert world.now() == rolled_back
    assert edit.backups(world.file) == kept


def test_without_a_file_the_server_alone_is_switched(world: World, server: Pretended) -> None:
    code, out, _ = world("--yes")
    assert code == 0
    assert "No file is changed: there is none." in out
    assert server.asked[-1]["to"] == "fallback"


@pytest.mark.parametrize("differs", ["model", "backend"])
def test_a_file_that_is_not_the_server_s_stays(world: World, server: Pretended, differs: str) -> None:
    old = world.write()
    if differs == "model":
        build_random(world.root / "elsewhere")
        server.status["model"] = {"id": "m", "path": str(world.root / "elsewhere")}
    else:
        server.status.update(configured_backend="mine", backend="mine")
    code, out, _ = world("--yes")
    assert code == 0
    assert "is not changed" in out
    assert world.now() == old
    assert server.asked[-1]["to"] == "fallback"


def test_a_server_that_was_started_with_flags(world: World) -> None:
    """Its block and its port are what counts, not those that the file means without flags."""
    blocks = {"mlx": {"port": PORT, "modelPath": "elsewhere"}, "mine": {"modelPath": "model"}}
    world.file.write_text(json.dumps({"backend": "claude", "backends": blocks}))
    flags = {"configured_backend": "mine", "backend": "mine"}
    with pretended(world.state_dir, PORT + 1, str(world.model), **flags):
        assert world("--port", str(PORT + 2), "--yes")[0] == 1  # nothing runs there, and the file means no server
        assert world("--yes")[0] == 0
    after = json.loads(world.now())
    assert after["backends"]["mine"].pop("serverScript") == str(world.legacy)
    assert after == {"backend": "claude", "backends": blocks}


def test_a_server_goes_only_to_its_own_fallback(world: World, server: Pretended) -> None:
    (world.root / "mine.sh").write_text("#!/bin/bash\nexec true\n")
    (world.root / "mine.sh").chmod(0o755)
    old = world.write().replace('"serverScript": "x"', '"serverScript": "mine.sh"')
    world.file.write_text(old)
    code, _, err = world("--to", "other", "--yes")
    assert code == 1
    assert '"fallback": "other"' in err
    assert (server.asked, world.now()) == ([], old)


def test_ctrl_c_leaves_it_switching_and_the_file_alone(
    world: World, server: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    old = world.write()
    monkeypatch.setattr(rollback_switch, "phase_text", interrupt)
    code, _, err = world("--yes")
    assert code == 130
    assert "goes on switching" in err
    assert world.now() == old


def test_what_cannot_be_written_is_said_after_the_switch(
    world: World, server: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LaunchError("not_written", "the disk is full")

    old = world.write()
    monkeypatch.setattr(edit, "write", full)
    code, _, err = world("--yes")
    assert code == 1
    assert "mlx-legacy serves now, but the disk is full" in err
    assert world.now() == old
