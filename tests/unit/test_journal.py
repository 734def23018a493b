"""Files that grow, and the channel's lines, without a process."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.unprivileged import drop_capabilities

from mlx_launcher.supervisor.channel import MAX_LINE, Channel
from mlx_launcher.supervisor.journal import TAIL, Journal, RotatingFile


def sizes(path: Path) -> list[int]:
    return [p.stat().st_size for p in sorted(path.parent.glob(f"{path.name}*"))]


def test_rotation_cuts_at_lines_and_keeps_three(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(str(path), 100)
    for n in range(100):
        file.write(b"line %04d\n" % n)  # ten bytes
    assert sizes(path) == [100, 100, 100, 100]
    assert path.read_bytes().splitlines()[-1] == b"line 0099"
    assert (tmp_path / "log.3").read_bytes().splitlines()[0] == b"line 0060"


def test_rotation_of_one_write_that_is_larger_than_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(str(path), 100)
    file.write(b"first\n" + b"\xff" * 250 + b"\nlast\n")
    assert sorted(sizes(path)) == [6, 56, 100, 100]
    assert path.read_bytes().endswith(b"last\n")


def test_a_file_that_someone_emptied_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(str(path), 100)
    file.write(b"x" * 99)
    os.truncate(path, 0)
    file.write(b"after\n")
    assert path.read_bytes() == b"after\n"
    assert sizes(path) == [6]


def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code = "import sys; from mlx_launcher.supervisor.journal import RotatingFile; "
    code += "file = RotatingFile(sys.argv[1], 100); file.write(b'lost'); print(file.error)"
    said = subprocess.check_output(
        [sys.executable, "-c", code, str(tmp_path / "log")], text=True, preexec_fn=drop_capabilities
    )
    assert said == "Permission denied\n"
    tmp_path.chmod(0o700)
    file = RotatingFile(str(tmp_path / "log"), 100)
    file.write(b"kept")
    assert file.error is None


def test_a_fifo_without_a_reader_is_an_error_not_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    file = RotatingFile(str(tmp_path / "log"), 100)
    file.write(b"lost")
    assert file.error


def test_the_journal_keeps_the_last_events(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.jsonl"))
    for n in range(TAIL + 5):
        journal.note("tick", n=n, odd="\udcff")
    assert [line["n"] for line in journal.tail] == list(range(5, TAIL + 5))
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(TAIL + 5))
    assert lines[0]["at"].endswith("Z")


def test_what_a_full_disk_cut_off_does_not_swallow_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, room, real = tmp_path / "journal.jsonl", [25], os.write

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    journal = Journal(str(path))
    journal.note("torn")
    journal.note("lost")
    room[0] = 1000
    journal.note("first")
    journal.note("second")
    torn, *whole = path.read_text().splitlines()
    assert len(torn) == 25
    assert [json.loads(line)["event"] for line in whole] == ["first", "second"]


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield Channel(ours), theirs
    ours.close()
    theirs.close()


def everything(channel: Channel) -> list[dict[str, object]]:
    messages = []
    for _ in range(20):
        messages += channel.receive()
    return messages


def test_messages_in_pieces(pair: tuple[Channel, socket.socket]) -> None:
    channel, host = pair
    host.sendall(b'{"a":1}\n{"b"')
    assert everything(channel) == [{"a": 1}]
    host.sendall(b":2}\n")
    assert everything(channel) == [{"b": 2}]


@pytest.mark.parametrize("length", [MAX_LINE + 1, 2 * MAX_LINE, 2 * MAX_LINE + 1, 150_000])
def test_a_line_that_is_too_long_is_dropped_and_the_next_is_heard(
    pair: tuple[Channel, socket.socket], length: int
) -> None:
    channel, host = pair
    host.sendall(b"x" * length + b'\n{"a":1}\n')
    assert everything(channel) == [{"a": 1}]
    assert channel.dropped == 1


@pytest.mark.parametrize("line", [b"", b"nonsense", b"[1]", b"\xff", b"[" * 60_000])
def test_what_is_no_message_is_dropped(pair: tuple[Channel, socket.socket], line: bytes) -> None:
    channel, host = pair
    host.sendall(line + b'\n{"a":1}\n')
    assert everything(channel) == [{"a": 1}]
    assert channel.dropped == 1


def test_sending_never_waits(pair: tuple[Channel, socket.socket]) -> None:
    channel, host = pair
    channel.send({"text": "x" * 3_000_000})
    assert channel.wants_to_write
    received = b""
    while not received.endswith(b"\n"):
        received += host.recv(1 << 20)
        channel.flush()
    assert len(json.loads(received)["text"]) == 3_000_000
    assert not channel.wants_to_write


def test_the_end_of_the_host_is_seen_once_and_nothing_raises(pair: tuple[Channel, socket.socket]) -> None:
    channel, host = pair
    host.sendall(b'{"last":1}\n')
    host.close()
    assert everything(channel) == [{"last": 1}]
    assert channel.ended
    channel.send({"type": "drain"})
    assert not channel.wants_to_write
