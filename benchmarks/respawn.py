"""`kill -9` of a trivial server to the next answer, over a bare start of the same kind of child: ours, gunicorn, runit.

    python -m benchmarks.respawn [--json]

gunicorn (the extra `bench`) and runit (a package of the system) are measured beside it where they are found.
The child answers HTTP with the standard library; what is compared is the wait that the supervisor adds.
"""

import contextlib
import functools
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.row import Row, show, spread, within

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.supervised import FAKE_HOST, Launched, make_plan
from support.waiting import free_port, until

KILLS = 20
GOAL_MS = 50
Manner = Callable[[Path, int], contextlib.AbstractContextManager[None]]

# Answers with its pid, as our fake host does.
SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
APP = """
import os
def app(environ, start_response):
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]
"""


def pid_that_answers(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/pid")
        return int(connection.getresponse().read())
    finally:
        connection.close()


def answered(port: int) -> int:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        return pid_that_answers(port)
    return 0


def another_answers(port: int, pid: int) -> bool:
    return answered(port) not in (0, pid)


def kill(port: int, kills: int) -> list[float]:
    """Milliseconds from each kill to the first answer of the successor."""
    waits = []
    for _ in range(kills):
        pid = until(lambda: answered(port))
        # Long enough that no supervisor takes it for a crash loop.
        time.sleep(1.2)
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        until(functools.partial(another_answers, port, pid))
        waits.append((time.perf_counter() - began) * 1000)
    return waits


def bare_start(argv: list[str], port: int, times: int, **options: object) -> list[float]:
    """Milliseconds from starting the child by hand to its first answer."""
    starts = []
    for _ in range(times):
        began = time.perf_counter()
        process = subprocess.Popen(argv, **options)  # type: ignore[call-overload]
        until(lambda: answered(port))
        starts.append((time.perf_counter() - began) * 1000)
        process.kill()
        process.wait()
    return starts


@contextlib.contextmanager
def ours(directory: Path, port: int) -> Iterator[None]:
    restart = {"max_restarts": 10_000, "backoff_s": 0.0, "window_s": 0.5}
    launched = Launched(make_plan(directory / "state" / str(port), port, restart=restart))
    try:
        yield
    finally:
        launched.clean_up()


@contextlib.contextmanager
def gunicorn(directory: Path, port: int) -> Iterator[None]:
    (directory / "trivial.py").write_text(APP)
    argv = [
        sys.executable,
        "-m",
        "gunicorn",
        "-w",
        "1",
        "-b",
        f"127.0.0.1:{port}",
        "--log-level",
        "critical",
        "trivial:app",
    ]
    process = subprocess.Popen(argv, cwd=directory)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def runit(directory: Path, port: int) -> Iterator[None]:
    service = directory / "service"
    service.mkdir()
    (service / "run").write_text(f"#!/bin/sh\nexec {sys.executable} -S {directory / 'server.py'} {port}\n")
    (service / "run").chmod(0o755)
    process = subprocess.Popen(["runsv", str(service)], start_new_session=True)
    try:
        yield
    finally:
        subprocess.run(["sv", "force-stop", str(service)], capture_output=True, check=False)
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="mlx-launch-respawn-") as name:
        return [_row(Path(name))]


def _row(directory: Path) -> Row:
    (directory / "server.py").write_text(SERVER)
    port = free_port()
    argv = [sys.executable, "-S", str(directory / "server.py"), str(port)]
    plain = statistics.median(bare_start(argv, port, KILLS, stderr=subprocess.DEVNULL))
    bare = statistics.median(_bare_fake_host(KILLS))
    waits = _waits(ours, directory)
    wait = statistics.median(waits)
    beside = []
    if importlib.util.find_spec("gunicorn"):  # it forks: its child has no start of its own
        beside.append(f"gunicorn with a kept socket {statistics.median(_waits(gunicorn, directory)):.0f} ms")
    if shutil.which("runsv"):
        beside.append(f"runit {statistics.median(_waits(runit, directory)) - plain:.0f} ms")
    added = wait - bare
    detail = (
        f"{wait:.0f} ms ({spread(waits)}) against {bare:.0f} ms, which adds {added:.0f} ms; medians of {KILLS}; "
        f"beside it: {', '.join(beside) or 'neither gunicorn nor runit is here'}"
    )
    what = "kill -9 of a trivial server to the next answer"
    return within(what, "a bare start of the same", GOAL_MS, "ms more", added, wait / bare, detail)


def _waits(manner: Manner, directory: Path) -> list[float]:
    port = free_port()
    with manner(directory, port):
        return kill(port, KILLS)


def _bare_fake_host(times: int) -> list[float]:
    starts = []
    for _ in range(times):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        ours_end, theirs = socket.socketpair()
        argv = [
            sys.executable,
            "-S",
            str(FAKE_HOST),
            "--channel",
            str(theirs.fileno()),
            "--listen",
            str(listener.fileno()),
        ]
        began = time.perf_counter()
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno(), listener.fileno()], stdout=subprocess.DEVNULL)
        ours_end.sendall(b'{"type": "activate", "settings": {}}\n')
        until(functools.partial(answered, port))
        starts.append((time.perf_counter() - began) * 1000)
        process.kill()
        process.wait()
        for sock in (listener, ours_end, theirs):
            sock.close()
    return starts


if __name__ == "__main__":
    show(measure())
