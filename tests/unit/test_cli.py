"""The command itself: what it imports, how it draws, and that nothing ends in a traceback."""

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.cli import COMMANDS, main, status
from mlx_launcher.cli.output import App, clean, error_line, paint
from mlx_launcher.cli.progress import Progress, moving_line
from mlx_launcher.cli.screen import WIDTH, columns, duration, failed_screen, fit, ready_screen, size, status_screen
from mlx_launcher.config import first, paths
from mlx_launcher.errors import LaunchError

LONG = "/home/a user/" + "very-long-directory/" * 12 + "模型/Qwen3-Coder-30B-A3B-Instruct-4bit"
STATUS: dict[str, Any] = {
    "state": "ready",
    "phase": None,
    "progress": None,
    "url": "http://127.0.0.1:8081/v1",
    "listener": "owned",
    "draining": False,
    "backend": "mlx",
    "configured_backend": "mlx",
    "rollback": None,
    "model": {"id": "demo", "path": "/models/demo"},
    "supervisor": {"pid": 4194304, "uptime_s": 1e7, "rss_bytes": 12_345_678},
    "server": {
        "pid": 4194303,
        "uptime_s": 1e6,
        "rss_bytes": 98_765_432_100,
        "restarts": 3,
        "last_exit": {"at": "2026-11-22T14:00:00Z", "code": None, "signal": "SIGKILL", "reason": "killed " * 30},
    },
    "activity": {
        "in_flight": 1,
        "queued": 32,
        "requests": 1_234_567,
        "prompt_tokens": 1_234_567_890,
        "cached_tokens": 1_123_456_789,
        "completion_tokens": 123_456_789,
        "idle_s": 0.0,
    },
    "kv_cache": {"dir": LONG, "entries": 50, "bytes": 39_999_999_999, "limit_bytes": 40_000_000_000},
    "last_error": None,
    "notes": [],
    "events": [],
    "log_file": "/logs/server.log",
    "port": 8081,
}

# Everything of ours that `--help` and `status` may import; from others, click alone.
HELP_IMPORTS = {
    "mlx_launcher",
    "mlx_launcher.cli",
    "mlx_launcher.cli.groups",
    "mlx_launcher.cli.output",
    "mlx_launcher.config",
    "mlx_launcher.config.defaults",
    "mlx_launcher.errors",
}
STATUS_IMPORTS = HELP_IMPORTS | {
    "mlx_launcher.config.paths",
    "mlx_launcher.cli.instances",
    "mlx_launcher.cli.options",
    "mlx_launcher.cli.screen",
    "mlx_launcher.cli.status",
    "mlx_launcher.cli.tail",
    "mlx_launcher.supervisor",
    "mlx_launcher.supervisor.clients",
    "mlx_launcher.supervisor.control",
}
HEAVY_IN_THE_LIBRARY = {
    "asyncio",
    "email",
    "http",
    "logging",
    "multiprocessing",
    "ssl",
    "subprocess",
    "tempfile",
}
LIST_IMPORTS = """
import json, sys
before = set(sys.modules)
from mlx_launcher.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write(json.dumps(sorted(set(sys.modules) - before)))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize(("arguments", "allowed"), [(["--help"], HELP_IMPORTS), (["status"], STATUS_IMPORTS)])
def test_what_is_imported(arguments: list[str], allowed: set[str], tmp_path: Path) -> None:
    (tmp_path / "8081").mkdir()  # so that status asks
    command = [sys.executable, "-c", LIST_IMPORTS, "--state-dir", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    ours = {name for name in imported if name.split(".")[0] == "mlx_launcher"}
    others = {name.split(".")[0] for name in imported - ours}
    assert ours == allowed
    assert others - sys.stdlib_module_names == {"click"}
    assert not others & HEAVY_IN_THE_LIBRARY


def test_every_command_in_the_table_exists() -> None:
    for name in COMMANDS:
        done = run(name, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Usage: mlx-launch {name} ")


def test_python_m_is_the_same_program() -> None:
    assert run("--version").stdout.startswith("mlx-launch 0.")
    assert run().stdout == run("--help").stdout


# -- errors


def test_a_bug_is_one_line_and_its_details_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(status, "choose", bug)
    with pytest.raises(SystemExit) as ended:
        main(["--state-dir", str(tmp_path), "--json", "status"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(out)["errors"][0]["code"] == "internal"
    assert err.count("\n") == 1
    (details,) = tmp_path.iterdir()
    assert str(details) in err
    assert "Traceback" in details.read_text()
    assert stat.S_IMODE(details.stat().st_mode) == 0o600


def test_a_bug_without_a_state_directory_is_kept_elsewhere_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(status, "choose", bug)
    with pytest.raises(SystemExit):
        main(["--state-dir", str(tmp_path / "none"), "status"])
    (details,) = tmp_path.iterdir()
    assert str(details) in capsys.readouterr().err


def test_an_error_is_one_clean_line() -> None:
    error = LaunchError("c", "first\nsecond\x1b[31m red.", "Do this.")
    assert error_line(error) == "mlx-launch: first second?[31m red. Do this."
    assert error_line(LaunchError("c", "no hint")) == "mlx-launch: no hint."
    assert error_line(LaunchError("c", "what", "Is it?")) == "mlx-launch: what. Is it?"
    assert clean("a\tb\r\nc\x07\udcff") == "a b c??"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_launcher", "--state-dir", str(tmp_path), "stop"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "mlx-launch: the output cannot be written: No space left on device.\n"


def test_closed_descriptors(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m mlx_launcher --state-dir {tmp_path} stop"
    for closed in ("<&- >&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_poor_environment(tmp_path: Path) -> None:
    name = os.fsdecode(b"/nowhere/\xff\xc3\xbc")
    poor = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "HOME": "/nonexistent"}
    done = run("--state-dir", str(tmp_path), "start", "--model", name, **poor)
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-launch: there is no model at /nowhere/")
    assert done.stderr.count("\n") == 1


# -- the state directory


def test_where_the_state_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.state_dir(None, {}) == Path("/home/someone/.anyclaude/mlx-launch")
    assert paths.state_dir(None, {"MLX_LAUNCH_STATE_DIR": "/env"}) == Path("/env")
    assert paths.state_dir("/flag", {"MLX_LAUNCH_STATE_DIR": "/env"}) == Path("/flag")
    assert paths.state_dir("~/s", {}) == Path("/home/someone/s")
    monkeypatch.chdir(tmp_path)
    assert paths.state_dir("s", {}) == tmp_path / "s"


def test_the_state_directory_is_made_private_and_a_loose_one_of_ours_is_mended(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    paths.create_state_dir(new)
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    script = first.install_script(new, True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (script, script.parent)} == {0o700}
    cache, text, precious = new / "kvcache", script.parent / "notes", tmp_path / "precious"
    cache.mkdir()
    for file, mode in ((text, 0o644), (precious, 0o644), (cache, 0o777), (script.parent, 0o755), (new, 0o755)):
        file.touch()
        file.chmod(mode)
    (script.parent / "link").symlink_to(precious)
    script.chmod(0o755)
    paths.create_state_dir(new)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (new, cache, script, script.parent)} == {0o700}
    assert (stat.S_IMODE(text.stat().st_mode), stat.S_IMODE(precious.stat().st_mode)) == (0o600, 0o644)


def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError) as caught:
        paths.create_state_dir(tmp_path / "file" / "state")
    assert caught.value.code == "state_dir"
    assert "--state-dir" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_state_directory_that_must_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LaunchError, match="cannot be written to"):
        paths.create_state_dir(tmp_path)


# -- drawing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"id": LONG, "path": LONG + "x"}, "log_file": LONG, "last_error": "why " * 50},
        {"state": "starting", "phase": "loading", "server": None, "progress": {"done": 1, "total": 2}},
        {"draining": True, "listener": "lent", "backend": "mlx-legacy"},
        {"supervisor": {"pid": 1, "uptime_s": 0.0, "rss_bytes": None}, "activity": None, "kv_cache": None},
        {"model": {"id": "evil\x1b[2J\nmodel", "path": "\udcff"}},
    ],
)
def test_a_status_fits_80_columns_and_one_screen(changes: dict[str, Any]) -> None:
    lines = status_screen({**STATUS, **changes})
    assert len(lines) <= 24
    assert all(columns(line) <= WIDTH and line.isprintable() for line in lines)


def test_what_a_status_says() -> None:
    text = "\n".join(status_screen({**STATUS, "phase": "loading", "draining": True}))
    for part in ("port 8081: ready (loading, draining)", "pid 4194303, up 11 d 13 h, 99 GB", "1,234,567 done"):
        assert part in text


def test_a_long_reason_wraps_and_a_path_is_cut() -> None:
    reason = "rank 1 on 10.231.77.2: it froze: no sign of life for 7 s. " + "Look at it. " * 10
    lines = status_screen({**STATUS, "last_error": reason, "log_file": LONG})
    assert reason.strip() in " ".join(line.removeprefix("  last error").strip() for line in lines)
    assert sum(LONG[-20:] in line for line in lines) == 1
    endless = status_screen({**STATUS, "last_error": "why " * 500})
    assert endless[-2].endswith("...")
    assert len(endless) <= 24


def test_of_a_rank_that_starts_only_what_is_known_is_shown() -> None:
    row = {"rank": 1, "host": "10.0.0.2", "state": "starting", "pid": None, "rss_bytes": None, "last_progress_s": None}
    known = {**row, "rank": 0, "state": "ready", "pid": 7, "rss_bytes": 10**8, "last_progress_s": 3.4}
    lines = status_screen({**STATUS, "ranks": [known, row]})
    assert "  rank 0      10.0.0.2, ready, pid 7, 100 MB, got on 3 s ago" in lines
    assert "  rank 1      10.0.0.2, starting" in lines


def test_what_is_not_known_of_the_cache_is_no_zero() -> None:
    unknown = {"dir": None, "entries": 0, "bytes": 0, "limit_bytes": None}
    assert "  kv cache    - entries" in status_screen({**STATUS, "kv_cache": unknown})


def test_idle_says_what_brings_it_back() -> None:
    idle = {**STATUS, "state": "idle", "server": None, "start_s": 3725.0}
    text = "none, the next request starts it, which took 1 h 2 min last time"
    assert f"  server      {text}" in status_screen(idle)
    assert f"  server      {text}" in ready_screen(App([]), idle, False)
    assert "  server      none, the next request starts it" in status_screen({**idle, "start_s": None})
    assert "  server      none" in status_screen({**idle, "state": "restarting"})


def test_a_standby_is_shown() -> None:
    (line,) = [
        line for line in status_screen({**STATUS, "standby": {"pid": 7, "rss_bytes": 10**8}}) if "standby" in line
    ]
    assert line == "  standby     pid 7, 100 MB, takes over after a crash"


def test_a_failed_server_shows_the_end_of_its_log_whole(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join([f"line {n}" for n in range(40)] + ["x" * 100 + "the cause\x1b[0m"]))
    lines = failed_screen({**STATUS, "state": "failed"}, log, 3)
    assert all(columns(line) <= WIDTH and line.isprintable() for line in lines)
    assert "".join(line.removeprefix("  | ") for line in lines).endswith("line 38line 39" + "x" * 100 + "the cause?[0m")


def test_what_to_try_can_be_pasted(tmp_path: Path) -> None:
    app = App([])
    model = {"id": 'it\'s "odd"', "path": "/m"}
    odd = {**STATUS, "url": "http://[::1]:9000/v1", "model": model, "port": 9000}
    lines = "\n".join(ready_screen(app, odd, require_key=True))
    pasted = lines.partition("Try it:\n")[2].partition("\nStop it:")[0]
    shown = subprocess.run(
        ["sh", "-c", f'curl() {{ for a in "$@"; do printf "%s\\n" "$a"; done; }}; MLX_API_KEY=k; {pasted}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[:5] == [
        "http://[::1]:9000/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-H",
        "Authorization: Bearer k",
    ]
    assert json.loads(shown[6])["model"] == model["id"]


def test_how_to_stop_it_names_what_is_not_the_default() -> None:
    app = App([])
    assert app.typed("stop", 8081) == "mlx-launch stop"
    assert app.typed("stop", 9000) == "mlx-launch stop --port 9000"
    app.state_dir, app.state_dir_given = Path("/a b"), True
    assert app.typed("stop", 8081) == "mlx-launch --state-dir '/a b' stop"
    app.config = "my rc.json"
    assert app.typed("cache", 8081) == "mlx-launch --state-dir '/a b' --config 'my rc.json' cache"
    app.config, app.no_config = None, True
    assert app.typed("start", 9000) == "mlx-launch --state-dir '/a b' --no-config start --port 9000"


@pytest.mark.parametrize(
    ("text", "width", "fitted"),
    [
        ("short", 5, "short"),
        ("/a/long/path/to/model", 15, "/a/l...to/model"),
        ("模型模型模型模型", 10, "模...模型"),
        ("", 3, ""),
    ],
)
def test_fit(text: str, width: int, fitted: str) -> None:
    assert fit(text, width) == fitted
    assert columns(fitted) <= width


def test_numbers_for_people() -> None:
    assert [size(n) for n in (None, 0, 999, 1500, 12_000_000, 3_040_000_000)] == [
        "?",
        "0 B",
        "999 B",
        "1.5 kB",
        "12 MB",
        "3.0 GB",
    ]
    assert [duration(s) for s in (None, 0.9, 59, 61, 7500, 90_000)] == [
        "?",
        "0 s",
        "59 s",
        "1 min 1 s",
        "2 h 5 min",
        "1 d 1 h",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    with Progress(terminal, quiet=False) as progress:
        progress.show("restarting after: " + "a long reason " * 20)
        progress.show("loading", {"done": 1_500_000_000, "total": 3_000_000_000})
    drawn = terminal.getvalue().split("\r")
    assert "\n" not in terminal.getvalue()
    assert max(map(len, drawn)) == WIDTH - 1
    assert drawn[2].rstrip() == "loading  [##########..........]  50%  1.5 GB of 3.0 GB  0 s"
    assert len(drawn[2]) == len(drawn[1])  # covers what stood there
    assert drawn[-2].strip() == drawn[-1] == ""


@pytest.mark.parametrize("term", ["dumb", None])
def test_progress_elsewhere_is_one_line_per_change(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term or "xterm")
    stream = Terminal() if term else io.StringIO()
    with Progress(stream, quiet=False) as progress:
        for what, bytes_ in (
            ("importing", None),
            ("loading", {"done": 0, "total": 9}),
            ("loading", {"done": 5, "total": 9}),
        ):
            progress.show(what, bytes_)
    assert stream.getvalue() == "importing\nloading\n"


def test_progress_is_silent_beside_json() -> None:
    stream = Terminal()
    with Progress(stream, quiet=True) as progress:
        progress.show("loading", {"done": 1, "total": 2})
    assert stream.getvalue() == ""


def test_a_bar_stays_in_its_brackets() -> None:
    for done in (0, 1, 50, 99, 100, 150):
        assert moving_line("loading", {"done": done, "total": 100}, 0).index("]") == 30
    assert moving_line("loading", {"done": 0, "total": 0}, 3.0) == "loading  3 s"


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("ready", Terminal()) == "\x1b[32mready\x1b[0m"
    assert paint("starting", Terminal()) == "starting"
    assert paint("ready", io.StringIO()) == "ready"
    monkeypatch.setenv("TERM", "dumb")
    assert paint("ready", Terminal()) == "ready"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("ready", Terminal()) == "ready"
