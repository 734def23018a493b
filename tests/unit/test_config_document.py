"""Finding and reading the file: what is taken, what is ignored, and what is refused with its place."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from mlx_launcher.config import document
from mlx_launcher.config.document import Document, find, read
from mlx_launcher.errors import LaunchError


def reading(tmp_path: Path, text: str | bytes, name: str = "c.json") -> Document:
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(file)


def test_the_order_in_which_it_is_found(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for directory in (here, home):
        directory.mkdir()
    expected = [directory / name for directory in (here, home) for name in document.NAMES]
    for file in expected:
        file.touch()
    for file in expected:
        assert find(None, {}, str(here), home) == file
        file.unlink()
    assert find(None, {}, str(here), home) is None
    assert find(None, {}, str(here), None) is None


def test_the_flag_and_the_environment_go_before(tmp_path: Path) -> None:
    (tmp_path / ".anyclauderc.json").touch()
    environment = {"MLX_LAUNCH_CONFIG": "other.json"}
    assert find(None, environment, str(tmp_path), None) == tmp_path / "other.json"
    assert find("-a b.json", environment, str(tmp_path), None) == tmp_path / "-a b.json"
    assert find("/x/../y", {}, str(tmp_path), None) == Path("/y")


def test_a_link_to_nowhere_is_found_and_refused(tmp_path: Path) -> None:
    (tmp_path / ".anyclauderc.json").symlink_to("nowhere")
    file = find(None, {}, str(tmp_path), None)
    assert file
    with pytest.raises(LaunchError, match="it is a link to nowhere, which is not there"):
        read(file)


def test_comments_are_left_out_at_any_depth(tmp_path: Path) -> None:
    text = '{"// a": 1, "//b": {"x": 1}, "// a": 2, "backends": {"// c": 3, "mlx": {"// d": 4, "port": 1}}}'
    read_ = reading(tmp_path, text)
    assert read_.data == {"backends": {"mlx": {"port": 1}}}
    assert read_.problems == []


@pytest.mark.parametrize(
    ("name", "text"), [("c.json", '{"a": 1, "b": {"c": 1, "c": 2}}'), ("c.yaml", "b:\n  c: 1\n  c: 2\n")]
)
def test_a_key_that_is_there_twice_is_a_warning(name: str, text: str, tmp_path: Path) -> None:
    (problem,) = reading(tmp_path, text, name).problems
    assert (problem.severity, problem.path[-1]) == ("warning", "c")


def test_yaml(tmp_path: Path) -> None:
    text = "# comment\nbase: &base\n  port: 8081\nbackends:\n  mlx:\n    <<: *base\n    model: m\n    on: 2026-01-01\n"
    assert reading(tmp_path, text, ".anyclauderc.yml").data["backends"]["mlx"] == {
        "port": 8081,
        "model": "m",
        "True": "2026-01-01",
    }
    assert reading(tmp_path, "", "c.yaml").data == {}


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("c.json", '{\n "a": 1,\n}', "line 3, column 1"),
        ("c.json", '{"a": NaN}', "NaN"),
        ("c.json", '{"a": ' + "1" * 5000 + "}", "integer string conversion"),
        ("c.json", "[" * 100_000, "nested too deep"),
        ("c.json", '{"a":' * 200 + "1" + "}" * 200, "too deep"),
        ("c.json", "[]", "an object is wanted, not a list"),
        ("c.json", "null", "an object is wanted, not null"),
        ("c.json", "", "line 1"),
        ("c.json", b'{"a":\n"\xff"}', "line 2 is not UTF-8"),
        ("c.json", b"\xef\xbb\xbf{}", "byte order mark"),
        ("c.yaml", "a: [1\nb: 2", "line 2"),
        ("c.yaml", "a: \x07", "control characters"),
        ("c.yaml", "a: 2026-99-99", "value cannot be read"),
        ("c.yaml", "a: &a [*a]", "too many values, or too deep"),
        ("c.yaml", "!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("c.yaml", "[" * 50_000, "line 1: it is nested too deep"),
        ("c.yaml", "{a: " * 30_000, "nested too deep"),
        ("c.yaml", "? " * 60_000, "nested too deep"),
        (
            "c.yaml",
            "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x]\n" for i in range(30)),
            "too many",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(name: str, text: str | bytes, place: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=place) as caught:
        reading(tmp_path, text, name)
    assert (caught.value.code, caught.value.exit_code) == ("config_invalid", 4)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ['{"a": "x\\u0000"}', '{"a\\ud800": 1}', '{"b": ["\\udfff"]}'])
def test_texts_that_no_program_can_be_given_are_errors(text: str, tmp_path: Path) -> None:
    assert [problem.severity for problem in reading(tmp_path, text).problems] == ["error"]


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(LaunchError, match="no regular file"):
            read(file)


LARGE: dict[str, Callable[[int], str]] = {
    "keys": lambda size: json.dumps({f"key{number}": number for number in range(size // 20)}),
    "unknown": lambda size: json.dumps(
        {"backends": {"mlx": {f"portt{number}": number for number in range(size // 24)}}}
    ),
    "blocks": lambda size: json.dumps(
        {"backends": {f"b{number}": {"port": "x", "fallback": "y"} for number in range(size // 52)}}
    ),
    "list": lambda size: "[" + "1," * (size // 2 - 2) + "1]",
    "text": lambda size: '{"a": "' + "x" * (size - 20) + '"}',
}


def calls_to_check(file: Path) -> int:
    """How many functions are called to read and check a file: its work, which does not vary as its time does."""
    from mlx_launcher.config.check import check_all

    calls = 0

    def count(_frame: FrameType, _event: str, _argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        with contextlib.suppress(LaunchError):
            check_all(read(file))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
@pytest.mark.parametrize("written", LARGE.values(), ids=LARGE)
def test_a_larger_file_is_no_more_than_its_share_of_work(
    name: str, written: Callable[[int], str], tmp_path: Path
) -> None:
    small, large = tmp_path / "small" / name, tmp_path / "large" / name
    for file, size in ((small, document.MAX_BYTES // 2), (large, document.MAX_BYTES)):
        file.parent.mkdir()
        file.write_text(written(size))
        assert 0.6 * size < file.stat().st_size <= size
    calls_to_check(small)  # what is imported and compiled once is no file's work
    assert calls_to_check(large) < 2.2 * calls_to_check(small)
