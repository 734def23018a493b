"""From the start of the server's process to the first streamed token: `mlx-launch run` against `mlx_textgen serve`.

    python -m benchmarks.first_token [--json]

Both with the same model and installed set, asked from the first moment on, and after a first start that is not counted: what an
import has learned is kept then, as what Python has compiled is. And from `kill -9` of a server with a standby to the first token
after it.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.row import Row, at_most, interleaved, show, spread
from benchmarks.streaming import stream
from benchmarks.upstream import NAME, Upstream
from mlx_launcher.demo import build_random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.launched import Launcher
from support.waiting import free_port, until

ROUNDS = 5
TOKENS = 4
PROMPT = "Hello"
DEADLINE_S = 180.0
RESTS_S = 1.0
_WHAT = "start to first token"
_AGAINST = "mlx_textgen serve to its first streamed token"
# Of `python -X importtime` and cProfile, on the machine of RESULTS.md.
_WHY_START = (
    "both import mlx-lm and transformers, most of the time on both sides; ours begins with the command and the supervisor, "
    "0.3 s, and loads and proves the model in 0.2 s"
)
_WHY_STANDBY = (
    "what is left after the imports is the load (0.1 s), the proof of one token, and noticing the death; of an 11 MB model that "
    "is compared with a start that is hardly more than imports"
)


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = build_random(place / "random")
        state, home = place / "state", place / "home"
        _start(model, state), _upstream(model, home)
        starts, theirs = interleaved(ROUNDS, lambda _: _start(model, state), lambda _: _upstream(model, home))
        kills = _kills(model, place)
    return [
        _row(_WHAT, 0.7, starts, theirs, _WHY_START),
        _row("kill -9 to first token, with a standby", 0.25, kills, theirs, _WHY_STANDBY),
    ]


def _row(what: str, goal: float, ours: list[float], theirs: list[float], why: str) -> Row:
    a, b = statistics.median(ours), statistics.median(theirs)
    detail = f"{a:.2f} s ({spread(ours)}) against {b:.2f} s ({spread(theirs)}), medians of {ROUNDS}, llama of 11 MB (float32)"
    return at_most(what, _AGAINST, goal, a / b, detail, why)


def _first_token(port: int) -> float:
    """When it came. Asks again while there is nobody to ask: a client that waits for a server does the same."""
    deadline = time.perf_counter() + DEADLINE_S
    while True:
        asked = time.perf_counter()
        try:
            return asked + stream(port, PROMPT, TOKENS, model=NAME).first_s
        except ConnectionError:
            assert time.perf_counter() < deadline, f"no token in {DEADLINE_S} s"
            time.sleep(0.01)


def _start(model: Path, state: Path) -> float:
    launcher = Launcher(state)
    began = time.perf_counter()
    process = _run(launcher, model)
    try:
        return _first_token(launcher.port) - began
    finally:
        _end(process)


def _upstream(model: Path, home: Path) -> float:
    port = free_port()
    began = time.perf_counter()
    with Upstream(model, port, home):
        return _first_token(port) - began


def _kills(model: Path, place: Path) -> list[float]:
    """Seconds from each kill to the first token of what was the standby; each standby is waited for."""
    launcher = Launcher(place / "standby")
    config = place / ".anyclauderc.json"
    # Each kill is a first one: after further ones within the window there would be a pause.
    block = {"port": launcher.port, "model": str(model), "standby": True, "restart": {"window": f"{RESTS_S:g}s"}}
    config.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": block}}))
    process = _run(launcher, model, "--config", str(config))
    waits = []
    try:
        for _ in range(ROUNDS):
            _first_token(launcher.port)
            until(lambda: _standby_rests(launcher), DEADLINE_S, "a standby")
            pid = launcher.server_pid()
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            waits.append(_first_token(launcher.port) - began)
    finally:
        _end(process)
    return waits


def _standby_rests(launcher: Launcher) -> bool:
    """Whether there is one that has imported everything: it then uses no CPU any more."""
    standby = launcher.status()["standby"]
    if not standby or not standby["rss_bytes"]:
        return False
    process = psutil.Process(standby["pid"])
    before = process.cpu_times()
    time.sleep(RESTS_S)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system < RESTS_S / 10


def _run(launcher: Launcher, model: Path, *options: str) -> "subprocess.Popen[bytes]":
    asked = ["run", "--port", str(launcher.port), "--model", str(model)]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_launcher", "--state-dir", str(launcher.state_dir), *options, *asked],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    process.wait(60)


if __name__ == "__main__":
    show(measure())
