"""`mlx-launch status --watch` on a terminal, on a pipe, and at the end of what it watches."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.supervised import ROOT, Launched
from support.waiting import until

Launch = Callable[..., Launched]
ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal of a size with `status --watch` on it; `output` is what it wrote until now."""

    def __init__(self, launched: Launched, columns: int, rows: int, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(theirs)
        self.output = b""
        names = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "TERM")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_launcher", *_where(launched), "status", "--watch"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**names, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
            start_new_session=True,
        )
        self._theirs = theirs

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> bytes:
        while select.select([self._ours], [], [], 0)[0]:
            self.output += os.read(self._ours, 65536)
        return self.output

    def until(self, text: str) -> None:
        until(lambda: text in self.screen(), 20, f"{text!r} on the screen")

    def screen(self) -> str:
        """The last whole picture."""
        pictures = self.read().split(b"\x1b[H")
        whole = [picture for picture in pictures[1:] if b"\x1b[J" in picture]
        return ESCAPE.sub("", whole[-1].decode().partition("\x1b[J")[0]) if whole else ""

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        until(lambda: (self.read(), self.process.poll())[1] is not None, 20, "its end")
        self.read()
        assert termios.tcgetattr(self._theirs) == self.before
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


def _where(launched: Launched) -> list[str]:
    return ["--state-dir", str(launched.instance.parent)]


@contextlib.contextmanager
def terminal(launched: Launched, columns: int = 80, rows: int = 24, **environment: str) -> Iterator[Terminal]:
    shown = Terminal(launched, columns, rows, **environment)
    try:
        yield shown
    finally:
        shown.close()


@pytest.fixture
def launched(launch: Launch) -> Launched:
    started = launch("--counts")
    started.until_state("ready")
    return started


def test_it_moves_in_place_and_leaves_the_terminal_as_it_was(launched: Launched) -> None:
    with terminal(launched) as shown:
        shown.until(": ready")
        launched.get("/answer")
        shown.until("1 done")
        assert "last events" in shown.screen()
        assert shown.end(signal.SIGINT) == 0
        output = shown.output
    assert output.startswith(ENTER)
    assert output.endswith(LEAVE)
    assert output.count(ENTER) == output.count(LEAVE) == 1
    for picture in output.decode().split("\x1b[H")[1:]:
        lines = ESCAPE.sub("", picture).split("\r\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) < 80


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal_too(launched: Launched, number: int) -> None:
    with terminal(launched) as shown:
        shown.until(": ready")
        assert shown.end(number) == 128 + number
        assert shown.output.endswith(LEAVE)


def test_a_closed_window_ends_it_and_is_no_bug(launched: Launched, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    pid, ours = pty.fork()  # a session of its own, whose terminal this is
    if not pid:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
        argv = [sys.executable, "-m", "mlx_launcher", *_where(launched), "status", "--watch"]
        os.execve(sys.executable, argv, {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"})
    said = bytearray()

    def drawn() -> bool:
        if select.select([ours], [], [], 0)[0]:
            said.extend(os.read(ours, 65536))
        return b"\x1b[J" in said

    until(drawn, 20, "a picture")
    os.close(ours)
    ended = until(lambda: (found := os.waitpid(pid, os.WNOHANG))[0] and found, 20, "its end")
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    assert errors.read_text() == ""
    assert not list(launched.instance.parent.glob("mlx-launch-error-*"))


def test_another_size_is_another_picture(launched: Launched) -> None:
    with terminal(launched) as shown:
        shown.until(": ready")
        shown.resize(40, 6)
        shown.process.send_signal(signal.SIGWINCH)
        until(lambda: len(shown.screen().split("\r\n")) == 6, 20, "six lines")
        assert max(map(len, shown.screen().split("\r\n"))) < 40
        assert shown.end(signal.SIGINT) == 0


def test_colour_is_a_matter_of_taste(launched: Launched) -> None:
    with terminal(launched) as plain, terminal(launched, NO_COLOR="1") as bare:
        for shown in (plain, bare):
            shown.until(": ready")
        assert b"\x1b[32mready" in plain.output
        assert b"\x1b[32m" not in bare.output


def test_a_dumb_terminal_gets_one_block_after_the_other(launched: Launched) -> None:
    with terminal(launched, TERM="dumb") as shown:
        until(lambda: shown.read().count(b": ready") >= 2, 20, "two blocks")
        assert shown.end(signal.SIGINT) == 0
        assert b"\x1b" not in shown.output


def _piped(launched: Launched, *arguments: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "mlx_launcher", *_where(launched), "status", "--watch", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_pipe_gets_blocks_and_at_the_end_a_sentence(launched: Launched) -> None:
    with _piped(launched) as process:
        assert process.stdout
        seen = [process.stdout.readline() for _ in range(30)]
        launched.stop()
        out, err = process.communicate(timeout=20)
    text = "".join(seen) + out
    assert text.count(f"port {launched.port}: ready") >= 2
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.endswith(f"the server on port {launched.port} was stopped\n")
    assert (process.returncode, err) == (0, "")


def test_whoever_reads_the_pipe_may_leave(launched: Launched) -> None:
    with _piped(launched) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_json_is_one_envelope_a_line(launched: Launched) -> None:
    with _piped(launched, "--json") as process:
        assert process.stdout
        seen = [process.stdout.readline() for _ in range(2)]
        launched.process.kill()
        out, err = process.communicate(timeout=30)
    *envelopes, last = [json.loads(line) for line in (*seen, *out.splitlines())]
    for envelope in envelopes:
        assert list(envelope) == ["schema", "command", "ok", "data", "errors"]
        assert (envelope["ok"], envelope["data"]["state"]) == (True, "ready")
    assert [error["code"] for error in last["errors"]] == ["not_running"]
    assert process.returncode == 3
    assert err.count("\n") == 1


def test_a_supervisor_that_stands_still_is_waited_for(launched: Launched) -> None:
    with terminal(launched) as shown:
        shown.until(": ready")
        launched.process.send_signal(signal.SIGSTOP)
        shown.until("does not answer")
        launched.process.send_signal(signal.SIGCONT)
        until(lambda: "does not answer" not in shown.screen(), 20, "an answer")
        launched.stop()
        assert shown.ended() == 0
        assert b"was stopped" in shown.output.rpartition(LEAVE)[2]


def test_a_load_shows_how_far_it_is(launch: Launch) -> None:
    launched = launch("--loading-s", "4")
    with terminal(launched) as shown:
        shown.until("loading  [")
        assert shown.end(signal.SIGINT) == 0
