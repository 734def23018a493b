"""What the launcher itself costs, beside supervisord, supervisorctl and Click: memory, `--help`, `status`, `doctor`.

    python -m benchmarks.small [--json]

Needs `supervisor` (the extra `bench`). Both supervisors keep one server; memory is what stays resident.
"""

import configparser
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.row import Row, at_most, interleaved, show, spread, within

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.launched import Launcher
from support.waiting import until

ROUNDS = 25
DOCTOR_ROUNDS = 5
MIB = 1 << 20
GOAL_MIB = 18
GOAL_DOCTOR_S = 5.0
SLEEPER = "import time\nwhile True: time.sleep(60)"
_ABSENT = "supervisor is not installed here: pip install 'mlx-launcher[bench]'"


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        launcher = Launcher(Path(directory) / "state")
        try:
            launcher.start("--demo")
            rows = [_help(), _doctor(launcher)]
            if importlib.util.find_spec("supervisor") is None:
                absent = Row("status", "supervisorctl status", "≤ 1×", None, False, "not measured", _ABSENT)
                return [_memory(launcher, None), *rows, absent]
            with supervisord(Path(directory)) as (configuration, theirs):
                return [_memory(launcher, theirs), *rows, _status(launcher, configuration)]
        finally:
            launcher.clean_up()


@contextmanager
def supervisord(directory: Path) -> Iterator[tuple[Path, psutil.Process]]:
    """A supervisord that keeps one process, as its manual configures it, and its configuration."""
    file, sock = directory / "supervisord.conf", directory / "supervisor.sock"
    parser = configparser.RawConfigParser()
    parser.read_dict(
        {
            "unix_http_server": {"file": sock},
            "supervisord": {"logfile": directory / "supervisord.log", "pidfile": directory / "supervisord.pid"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
            "supervisorctl": {"serverurl": f"unix://{sock}"},
            "program:sleeper": {"command": f"{sys.executable} {directory / 'sleeper.py'}"},
        }
    )
    (directory / "sleeper.py").write_text(SLEEPER)
    with file.open("w") as out:
        parser.write(out)
    process = subprocess.Popen(
        [*_program("supervisord"), "-n", "-c", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: "RUNNING" in _output([*_program("supervisorctl"), "-c", str(file), "status"]), 30, "supervisord")
        yield file, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _memory(launcher: Launcher, theirs: psutil.Process | None) -> Row:
    mine = psutil.Process(launcher.status()["supervisor"]["pid"]).memory_info().rss / MIB
    other = theirs.memory_info().rss / MIB if theirs else None
    detail = f"{mine:.1f} MiB against {f'{other:.1f} MiB' if other else 'nothing'} resident, one server each"
    return within("supervisor memory", "supervisord", GOAL_MIB, "MiB", mine, mine / (other or GOAL_MIB), detail)


def _help() -> Row:
    ours, theirs = [*_program("mlx-launch"), "--help"], [sys.executable, "-c", "import click"]
    return _times("--help", "import click", 1.3, ours, theirs)


def _status(launcher: Launcher, configuration: Path) -> Row:
    ours = [*_program("mlx-launch"), "--state-dir", str(launcher.state_dir), "status"]
    theirs = [*_program("supervisorctl"), "-c", str(configuration), "status"]
    return _times("status", "supervisorctl status", 1.0, ours, theirs)


def _doctor(launcher: Launcher) -> Row:
    argv = [*_program("mlx-launch"), "--state-dir", str(launcher.state_dir), "doctor"]
    # It fails where this machine lacks something, which takes it as long.
    took = [_milliseconds(argv, check=False) / 1000 for _ in range(DOCTOR_ROUNDS)]
    median = statistics.median(took)
    detail = f"{median:.2f} s ({spread(took)}), medians of {DOCTOR_ROUNDS}, beside a server that runs"
    return within("doctor", "–", GOAL_DOCTOR_S, "s", median, median / GOAL_DOCTOR_S, detail)


def _times(what: str, against: str, goal: float, ours: Sequence[str], theirs: Sequence[str]) -> Row:
    """Milliseconds from the start of a command to its end; one of each first, for the page cache."""
    _milliseconds(ours)
    _milliseconds(theirs)
    a, b = interleaved(ROUNDS, lambda _: _milliseconds(ours), lambda _: _milliseconds(theirs))
    detail = (
        f"{statistics.median(a):.0f} ms ({spread(a)}) against {statistics.median(b):.0f} ms ({spread(b)}), "
        f"medians of {ROUNDS}"
    )
    return at_most(what, against, goal, statistics.median(a) / statistics.median(b), detail)


def _milliseconds(argv: Sequence[str], *, check: bool = True) -> float:
    began = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=check)
    return (time.perf_counter() - began) * 1000


def _program(name: str) -> list[str]:
    """The script beside this interpreter."""
    return [str(Path(sys.executable).parent / name)]


def _output(argv: Sequence[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    show(measure())
