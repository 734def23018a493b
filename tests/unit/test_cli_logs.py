"""Reading logs: the end of one, across rotation, and following one for as long as somebody reads."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pretended import pretended

from mlx_launcher.cli import main
from mlx_launcher.cli.logs import event_line
from mlx_launcher.cli.tail import follow, last_lines

# Beside what every pretended status has, what one on the screen needs.
RUNNING: dict[str, Any] = {
    "supervisor": {"pid": 1, "uptime_s": 1.0, "rss_bytes": 1},
    "activity": dict.fromkeys(
        ("in_flight", "queued", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "idle_s"), 0
    ),
    "kv_cache": {"dir": None, "entries": 0, "bytes": 0, "limit_bytes": None},
    "log_file": "/its/server.log",
    "notes": [],
    "events": [],
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "8081" / "server.log"
    path.parent.mkdir()
    return path


def rotate(log: Path) -> None:
    for old, new in ((".2", ".3"), (".1", ".2"), ("", ".1")):
        source = Path(f"{log}{old}")
        if source.exists():
            source.replace(f"{log}{new}")


@pytest.mark.parametrize(
    ("content", "count", "lines"),
    [
        (b"", 3, []),
        (b"a\nb\nc\n", 2, ["b", "c"]),
        (b"a\nb\nc", 2, ["b", "c"]),
        (b"a\n", 5, ["a"]),
        (b"\n\n", 1, [""]),
        (b"a\nb\n", 0, []),
        (b"\xff\n", 1, ["�"]),
        (b"x" * 200_000 + b"\nend\n", 1, ["end"]),
        (b"x" * 200_000 + b"\nend\n", 2, ["x" * 200_000, "end"]),
        ((b"y" * 65_535 + b"\n") * 3, 2, ["y" * 65_535] * 2),
    ],
)
def test_the_last_lines(content: bytes, count: int, lines: list[str], log: Path) -> None:
    log.write_bytes(content)
    assert last_lines(log, count) == lines


def test_the_last_lines_go_back_into_rotated_files(log: Path) -> None:
    for text in ("1\n2\n", "3\n4\n", "5\n"):
        rotate(log)
        log.write_text(text)
    assert last_lines(log, 4) == ["2", "3", "4", "5"]
    assert last_lines(log, 99) == ["1", "2", "3", "4", "5"]
    log.unlink()
    assert last_lines(log, 1) == ["4"]


class Follower:
    """Follows a log in this process, one look per call."""

    def __init__(self, log: Path, count: int) -> None:
        self._blocks: Iterator[bytes] = follow(log, count, os.open(os.devnull, os.O_WRONLY))

    def until(self, end: bytes) -> bytes:
        seen = b""
        while not seen.endswith(end):
            seen += next(self._blocks)
        return seen


def test_following_across_rotations_misses_and_repeats_nothing(log: Path) -> None:
    log.write_text("old\nlast\n")
    follower = Follower(log, 1)
    assert follower.until(b"last\n") == b"last\n"
    with log.open("a") as file:
        file.write("a\n")
        rotate(log)
        file.write("b\n")  # a writer that has not noticed yet
    log.write_text("c\n")
    rotate(log)
    log.write_text("d\n")
    assert follower.until(b"d\n") == b"a\nb\nc\nd\n"


def test_following_a_log_that_is_begun_later_deleted_and_emptied(log: Path) -> None:
    log.write_text("first\n")
    follower = Follower(log, 5)
    assert follower.until(b"first\n") == b"first\n"
    log.unlink()
    log.write_text("second\n")
    assert follower.until(b"second\n") == b"second\n"
    log.write_text("3\n")
    assert follower.until(b"3\n") == b"3\n"


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlx_launcher", "--state-dir", str(log.parent.parent), "logs", "-f", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def leave_by_signal(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)


def leave_by_closing(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout
    process.stdout.close()


@pytest.mark.parametrize("leave", [leave_by_signal, leave_by_closing])
def test_following_ends_well(leave: Callable[[subprocess.Popen[bytes]], None], log: Path) -> None:
    log.write_text("here\n")
    process = start(log)
    assert process.stdout
    assert process.stderr
    try:
        assert process.stdout.readline() == b"here\n"
        leave(process)
        assert process.wait(timeout=10) == 0  # without another line being written
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()


def test_following_the_journal(log: Path) -> None:
    journal = log.with_name("journal.jsonl")
    journal.write_text('{"at": "T", "event": "spawn", "server": 7}\n{"at": "T", "ev')
    process = start(log, "--supervisor")
    assert process.stdout
    try:
        assert process.stdout.readline() == b"T spawn server=7\n"
        with journal.open("a") as file:
            file.write('ent": "ready"}\n')
        assert process.stdout.readline() == b"T ready\n"
    finally:
        process.kill()
        process.wait()


def test_a_journal_line_for_people() -> None:
    event = {"at": "T", "event": "exit", "server": 7, "code": None, "left": False, "reason": "ended by\x1b SIGKILL"}
    assert event_line(event) == 'T exit server=7 left=false reason="ended by\\u001b SIGKILL"'


def test_a_torn_journal_is_shown(log: Path) -> None:
    journal = log.with_name("journal.jsonl")
    journal.write_text('{"at": "T", "event": "a"}\n{"at": "T"\n')
    command = [sys.executable, "-m", "mlx_launcher", "--state-dir", str(log.parent.parent), "logs", "--supervisor"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["data"]["events"][1] == {"event": "unreadable", "line": '{"at": "T"'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["T a", 'unreadable line="{\\"at\\": \\"T\\""']


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert last_lines(pipe, 3) == []
    assert last_lines(Path("/dev/null"), 3) == []
    instance = tmp_path / "8081"
    instance.mkdir()
    (instance / "state.json").write_text(json.dumps({"status": {"log_file": str(pipe)}}))
    command = [sys.executable, "-m", "mlx_launcher", "--state-dir", str(tmp_path), "logs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"mlx-launch: {pipe} is no file")


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_a_log_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    (tmp_path / "elsewhere").write_text("not ours")
    with pretended(tmp_path, 18499, "/m", **RUNNING):
        log = tmp_path / "18499" / "server.log"
        log.mkdir() if kind == "directory" else log.symlink_to(tmp_path / "elsewhere")
        said = []
        for command in ("logs", "status"):
            with pytest.raises(SystemExit):
                main(["--state-dir", str(tmp_path), command])
            said.append("".join(capsys.readouterr()))
    logs, seen = said
    assert f"{log} is a {kind}" in logs
    assert "mlx-launch --state-dir" in logs
    assert "not ours" not in logs
    (line,) = [line for line in seen.splitlines() if line.startswith("  not kept ")]
    assert f"server.log is a {kind}" in line
