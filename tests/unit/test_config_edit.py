"""One value changed in a user's file: every other byte stays, and the file is the old or the new one."""

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.config import edit
from mlx_launcher.errors import LaunchError

PATH = ("backends", "mlx", "serverScript")
NEW = '"/new/mlx-server.py"'

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
STYLES = st.sampled_from(
    [
        {"indent": 2},
        {"indent": 4, "ensure_ascii": False},
        {"indent": "\t"},
        {"separators": (",", ":")},
        {"separators": (" , ", " : "), "indent": 1},
        {},
    ]
)


def written(value: Any, style: dict[str, Any], newline: str) -> str:
    text = json.dumps(value, **style)
    # A newline in a string is an escape, so every one that is there is white space.
    return text.replace("\n", newline) + newline


@given(OBJECTS, OBJECTS, OBJECTS, st.none() | VALUES, STYLES, st.sampled_from(["\n", "\r\n"]))
def test_any_object_keeps_all_but_the_value(
    top: dict[str, Any], blocks: dict[str, Any], block: dict[str, Any], old: Any, style: dict[str, Any], newline: str
) -> None:
    if old is not None:
        block = {**block, "serverScript": old}
    whole = {**top, "backends": {**blocks, "mlx": block}}
    text = written(whole, style, newline)
    raw = edit.raw_value(text, PATH)
    assert (raw is None) == ("serverScript" not in block)
    new = edit.set_value(text, PATH, NEW)
    assert json.loads(new) == {**whole, "backends": {**blocks, "mlx": {**block, "serverScript": json.loads(NEW)}}}
    assert list(json.loads(new)) == list(whole)
    assert edit.raw_value(new, PATH) == NEW
    if raw is not None:
        assert edit.set_value(new, PATH, raw) == text
    else:
        back = edit.remove_value(new, PATH)
        assert json.loads(back) == whole
        assert back == text or not block
        if "\n" not in new.strip():
            assert len(new) - len(text) <= len(NEW) + len('"serverScript" , : ')
    assert new.count(newline) == len(re.findall("\r?\n", new))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ('{"a": 1}', '{"a": 1, "serverScript": NEW}'),
        ('{"a":1}', '{"a":1,"serverScript":NEW}'),
        ('{ "a" : 1 }', '{ "a" : 1, "serverScript" : NEW }'),
        ('{"a":1,"b":2}', '{"a":1,"b":2,"serverScript":NEW}'),
        ("{}", '{"serverScript": NEW}'),
        ('{\n      "a": "}{,"\n    }', '{\n      "a": "}{,",\n      "serverScript": NEW\n    }'),
        ('{\r\n\t"a": [1],\r\n\t"b": {}\r\n}', '{\r\n\t"a": [1],\r\n\t"b": {},\r\n\t"serverScript": NEW\r\n}'),
        ('{"serverScript" :\n "x"\n, "// a": 1}', '{"serverScript" :\n NEW\n, "// a": 1}'),
        ('{"server\\u0053cript": "x"}', '{"server\\u0053cript": NEW}'),
        ('{"serverScript": null}', '{"serverScript": NEW}'),
    ],
)
def test_the_block_s_own_style(block: str, expected: str) -> None:
    around = '{"x": "\\u00e9 é", "backends": {"mlx": BLOCK }}'
    new = edit.set_value(around.replace("BLOCK", block), PATH, NEW)
    assert new == around.replace("BLOCK", expected.replace("NEW", NEW))


def test_an_empty_block_is_filled_in_the_file_s_indentation() -> None:
    text = '{\n  "backends": {\n    "mlx": {}\n  }\n}\n'
    wanted = '{\n  "backends": {\n    "mlx": {\n      "serverScript": NEW\n    }\n  }\n}\n'
    assert edit.set_value(text, PATH, NEW) == wanted.replace("NEW", NEW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "not JSON",
        '{"backends": {}}',
        '{"backends": {"mlx": "text"}}',
        '{"backends": []}',
        '{"backends": {"mlx": {"serverScript": 1, "serverScript": 2}}}',
        '{"backends": {"mlx": {}, "mlx": {}}}',
        '{"backends": {"mlx": {}}, "back\\u0065nds": {}}',
        '{"backends": {"mlx": {}},}',
        "[" * 100_000,
    ],
)
def test_what_cannot_be_located_once_is_refused(text: str) -> None:
    with pytest.raises(LaunchError) as refused:
        edit.set_value(text, PATH, NEW)
    assert refused.value.code == "not_located"


def test_removing_what_is_not_there_is_refused() -> None:
    with pytest.raises(LaunchError):
        edit.remove_value('{"backends": {"mlx": {}}}', PATH)


# -- the file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / ".anyclauderc.json"
    file.write_bytes(b'{"backends": {"mlx": {}}}\r\n')
    file.chmod(0o640)
    return file


def test_written_with_a_backup_beside_it(file: Path) -> None:
    old = file.read_bytes()
    backup = edit.write(edit.read(file), "new é\r\n")
    assert file.read_bytes() == "new é\r\n".encode()
    assert file.stat().st_mode & 0o777 == 0o640
    assert re.fullmatch(r"\.anyclauderc\.json\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(-\d+)?\.bak", backup.name)
    assert (backup.read_bytes(), backup.stat().st_mode & 0o777) == (old, 0o600)
    assert sorted(file.parent.iterdir()) == sorted([file, backup])


def test_backups_are_listed_from_the_youngest(file: Path) -> None:
    made = [edit.write(edit.read(file), f"{number}") for number in range(12)]
    (file.parent / ".anyclauderc.json.2026-01-01T00-00-00.bak").touch()  # of config init --force
    assert edit.backups(file) == made[::-1]


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "rc.json"
    link.symlink_to(file)
    edit.write(edit.read(link), "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert list(link.parent.iterdir()) == [link]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_owner_stays(file: Path) -> None:
    os.chown(file, 12345, 12346)
    edit.write(edit.read(file), "new")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)


@pytest.mark.parametrize("change", ["write", "remove", "replace"])
def test_what_somebody_else_changed_is_not_overwritten(file: Path, change: str) -> None:
    source = edit.read(file)
    if change == "write":
        file.write_text("theirs")
    elif change == "remove":
        file.unlink()
    else:
        file.unlink()
        (file.parent / "other").write_bytes(b"theirs")
        file.symlink_to(file.parent / "other")
    with pytest.raises(LaunchError) as refused:
        edit.write(source, "ours")
    assert refused.value.code == "changed_meanwhile"
    assert not file.exists() or file.read_text() == "theirs"
    assert not list(file.parent.glob("*.bak"))
    assert not list(file.parent.glob("*.new"))


def test_changed_while_the_new_one_is_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, keep = edit.read(file), edit.keep

    def meanwhile(real: Path, data: bytes) -> Path:
        file.write_text("theirs")
        return keep(real, data)

    monkeypatch.setattr(edit, "keep", meanwhile)
    with pytest.raises(LaunchError) as refused:
        edit.write(source, "ours")
    assert refused.value.code == "changed_meanwhile"
    assert list(file.parent.iterdir()) == [file]
    assert file.read_text() == "theirs"


def test_two_at_once(file: Path) -> None:
    fresh = file.parent / ".anyclauderc.json.mlx-launch.new"
    with fresh.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LaunchError) as refused:
            edit.write(edit.read(file), "ours")
    assert "another command" in refused.value.message
    # What one that was killed left is in nobody's way.
    fresh.write_text("a longer text, left by a killed command")
    edit.write(edit.read(file), "ours")
    assert file.read_text() == "ours"
    assert not fresh.exists()


def test_a_full_disk_leaves_the_old_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    old = file.read_bytes()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LaunchError) as refused:
        edit.write(edit.read(file), "ours")
    assert refused.value.code == "not_written"
    assert "No space left" in refused.value.message
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("absent", "latin"):
        with pytest.raises(LaunchError) as refused:
            edit.read(tmp_path / name)
        assert refused.value.code == "not_read"
