"""On a machine of a cluster that is not the leader's: a process between the ssh connection and the rank, without mlx.

The rank cannot look after itself: while it joins the others MLX lets none of its threads run. So this process ends it when
the leader is gone, or has not been heard of for `SILENCE_S`, as after a cut cable, which no end of file tells of.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import NoReturn

# The leader speaks once a second.
SILENCE_S = 15
END_S = 2.0
ROUND_S = 1.0
READ_BYTES = 65536


def watch_over() -> NoReturn:
    """Starts the rank with the environment of the leader's first line, and passes on what the two say until either ends.

    Stdin and stdout are the channel, stderr is the log. Never returns; exits with the rank's code, or 1.
    """
    source, sink = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)  # what a library prints is no message
    line = _first_line(source)
    try:
        environment = json.loads(line)["env"]
    except (ValueError, KeyError):
        os._exit(1)
    ours, theirs = socket.socketpair()
    rank = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlx_launcher.host", "rank", "--channel", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, **environment},
        process_group=0,
    )
    theirs.close()
    _say(sink, {"type": "began", "pid": rank.pid})
    _pass_on(source, sink, ours, rank)
    ours.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        rank.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    code = rank.wait()
    _say(sink, {"type": "exited", "code": code})
    os._exit(code if code >= 0 else 1)


def _pass_on(source: int, sink: int, ours: socket.socket, rank: "subprocess.Popen[bytes]") -> None:
    """Until the leader is gone or silent, or the rank has ended and all that it said is passed on."""
    silent_s, last = 0.0, time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(ours, selectors.EVENT_READ)
        while True:
            events = selector.select(ROUND_S)
            now = time.monotonic()
            # A machine that slept has not been left alone all that time.
            silent_s, last = silent_s + min(now - last, 2 * ROUND_S), now
            for key, _ in events:
                if key.fileobj is ours:
                    if not (said := ours.recv(READ_BYTES)) or not _write(sink, said):
                        return
                    continue
                silent_s = 0.0
                if not (told := os.read(source, READ_BYTES)):
                    return
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    ours.send(told, socket.MSG_DONTWAIT)
            if silent_s >= SILENCE_S or (rank.poll() is not None and not events):
                return


def _first_line(source: int) -> bytes:
    """Byte by byte, so that nothing of the next line is taken."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(source, 1)):
        line += byte
    return line


def _say(sink: int, message: dict[str, object]) -> None:
    _write(sink, json.dumps(message).encode() + b"\n")


def _write(sink: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(sink, data) :]
    except OSError:
        return False
    return True
