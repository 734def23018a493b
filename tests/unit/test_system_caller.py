import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.waiting import until

WATCHER = """
import sys, time
from mlx_launcher.system.caller import Caller
caller = Caller()
sys.stderr.write("watching\\n")
sys.stderr.flush()
while not caller.gone():
    time.sleep(0.01)
"""


# As on macOS, where poll looks at nothing unless something to read is asked for.
XNU = """
import select
class Poll:
    def __init__(self, inner=select.poll):
        self.inner = inner()
    def register(self, fd, events):
        if events & select.POLLIN:
            self.inner.register(fd, events)
    def poll(self, timeout):
        return self.inner.poll(timeout)
select.poll = Poll
"""


def watcher(stdout: int, before: str = "") -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", before + WATCHER], stdout=stdout, stderr=subprocess.PIPE)
    assert process.stderr
    assert process.stderr.readline() == b"watching\n"
    return process


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("before", ["", XNU], ids=["linux", "macos"])
def test_a_reader_that_hangs_up_is_noticed(kind: str, before: str) -> None:
    if kind == "pipe":
        ours, theirs = os.pipe()
    else:
        ours, theirs = (end.detach() for end in socket.socketpair())
    process = watcher(theirs, before)
    os.close(theirs)
    if kind == "socket":
        os.write(ours, b"nobody reads this, and it is no hang-up")
    assert process.poll() is None
    os.close(ours)
    assert process.wait(10) == 0


def test_a_file_never_hangs_up_and_a_parent_that_dies_is_noticed(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as file:
        # The shell stays as the parent, because there is something left to do after the command.
        shell = subprocess.Popen(
            ["sh", "-c", '"$0" -c "$1" & echo $! >&2; wait; true', sys.executable, WATCHER],
            stdout=file,
            stderr=subprocess.PIPE,
        )
        assert shell.stderr
        lines = sorted(shell.stderr.readline() for _ in range(2))
        pid = int(lines[0])
        assert lines[1] == b"watching\n"
        os.kill(shell.pid, signal.SIGKILL)
        shell.wait()
        until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)
