"""`start`, `status`, `logs` and `stop` with the real supervisor; only the server is a fake one."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.backends import assemble
from mlx_launcher.backends.legacy import legacy
from mlx_launcher.backends.textgen import textgen
from mlx_launcher.cli import launch, main, start
from mlx_launcher.cli.instances import ask, is_locked, not_running, remembered
from mlx_launcher.demo import build_random

FAKE_HOST = Path(__file__).parents[1] / "fakes" / "host.py"


class Bench:
    """Runs commands in this process, against a state directory and a port of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.state_dir = root / "state"
        self.port = _free_port()
        self.instance = self.state_dir / str(self.port)
        self.serve = ["--model", str(_model(root, "model")), "--port", str(self.port)]
        self.other = ["--model", str(_model(root, "other")), "--port", str(self.port)]
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.host()
        self.fallback()

    def host(self, *arguments: str) -> None:
        """What the next server is."""
        self._fake("textgen", textgen, arguments)

    def fallback(self, *arguments: str) -> None:
        """What takes its place."""
        self._fake("legacy", legacy, arguments)

    def _fake(self, name: str, real: Any, arguments: tuple[str, ...]) -> None:
        def fake(*args: Any, **kwargs: Any) -> Any:
            return {**real(*args, **kwargs), "argv": [sys.executable, "-S", str(FAKE_HOST), *arguments]}

        self._monkeypatch.setattr(assemble, name, fake)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["--state-dir", str(self.state_dir), *arguments])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    def json(self, *arguments: str) -> Any:
        return json.loads(self("--json", *arguments)[1])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    monkeypatch.delenv("MLX_API_KEY", raising=False)
    bench = Bench(tmp_path, monkeypatch, capsys)
    yield bench
    if is_locked(bench.instance) and (pid := remembered(bench.instance).get("pid")):
        os.kill(pid, signal.SIGKILL)


def _model(root: Path, name: str) -> Path:
    return build_random(root / name)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_round_trip(bench: Bench) -> None:
    code, out, err = bench("start", *bench.serve)
    assert (code, err) == (0, "")
    assert f"http://127.0.0.1:{bench.port}/v1/chat/completions" in out
    assert f"stop --port {bench.port}" in out

    code, out, err = bench("status")
    assert (code, err) == (0, "")
    assert out.startswith(f"port {bench.port}: ready\n")
    assert all(len(line) <= 80 for line in out.splitlines())

    code, out, err = bench("start", *bench.serve)
    assert (code, err) == (0, "")
    assert out.startswith("It was running already.\n")

    code, out, err = bench("start", *bench.other)
    assert (code, out) == (1, "")
    assert "model" in err
    assert "mlx-launch --state-dir" in err  # how to stop it

    assert bench("logs")[1].startswith("fake host ")
    assert " ready server=" in bench("logs", "--supervisor")[1]

    code, out, err = bench("stop")
    assert (code, err) == (0, "")
    assert out.endswith(f"Stopped the server on port {bench.port}.\n")
    assert not is_locked(bench.instance)
    assert bench("status")[0] == 3
    assert bench("stop")[::2] == (0, "")


def test_a_log_file_survives_its_server(bench: Bench) -> None:
    bench("start", *bench.serve)
    bench("stop")
    assert bench("logs")[1].startswith("fake host ")


def test_the_phases_are_shown_once_each(bench: Bench) -> None:
    bench.host("--loading-s", "0.5")
    lines = bench("start", *bench.serve)[1].splitlines()
    assert lines.count("loading") == 1


def test_a_server_that_fails(bench: Bench) -> None:
    bench.host("--fault", "the weights are torn")
    bench.fallback("--fault", "no mlx")
    code, out, err = bench("start", *bench.serve)
    assert code == 1
    assert "  | fake host " in out
    assert f"mlx-launch: the server on port {bench.port} failed: the fallback failed: no mlx" in err
    assert "the weights are torn" in err
    assert err.count("\n") == 1

    code, out, err = bench("status")
    assert code == 3
    assert out.startswith(f"port {bench.port}: failed\n")
    assert "  | fake host " in out
    assert "the weights are torn" in err
    assert bench.json("start", *bench.serve)["data"]["state"] == "failed"

    bench.host()
    assert bench("start", *bench.serve)[0] == 0


def test_a_server_that_fails_while_its_fallback_works_is_degraded_and_says_so(bench: Bench) -> None:
    bench.host("--fault", "the weights are torn")
    code, out, err = bench("start", *bench.serve)
    assert (code, err) == (0, "")
    assert "  state       degraded\n" in out
    assert "  backend     mlx-legacy instead of mlx" in out
    assert "  reason      the weights are torn" in out
    assert f"restart --port {bench.port}" in out

    code, out, err = bench("status")
    assert (code, err) == (0, "")
    assert out.startswith(f"port {bench.port}: degraded\n")
    assert "  backend     mlx-legacy instead of mlx" in out
    assert "Z, automatic\n  reason      the weights are torn" in out
    assert all(len(line) <= 80 for line in out.splitlines())

    code, out, err = bench("start", *bench.serve)
    assert (code, err) == (0, "")
    assert out.startswith("It was running already.\n")
    assert "the weights are torn" in out


def test_not_ready_in_time_goes_on_starting(bench: Bench) -> None:
    bench.host("--loading-s", "1")
    code, _, err = bench("start", *bench.serve, "--timeout", "0.2")
    assert code == 6
    assert "goes on starting" in err
    assert err.count("\n") == 1
    assert bench("start", *bench.serve)[0] == 0  # attaches, and waits


def test_no_wait(bench: Bench) -> None:
    bench.host("--loading-s", "30")
    envelope = bench.json("start", *bench.serve, "--no-wait")
    assert envelope["ok"]
    assert envelope["data"]["already_running"] is False
    assert envelope["data"]["state"] == "starting"
    assert bench("start", *bench.serve, "--no-wait")[1].startswith("It was running already (pid ")


def test_ctrl_c_leaves_it_starting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    bench.host("--loading-s", "30")
    with monkeypatch.context() as patch:
        patch.setattr(start, "phase_text", interrupt)
        code, _, err = bench("start", *bench.serve)
    assert code == 130
    assert "goes on starting in the background" in err
    assert f"stop --port {bench.port} ends it" in err
    assert bench("status")[0] == 0


def test_losing_the_race_is_attaching(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("start", *bench.serve)
    asked: list[dict[str, Any]] = []

    def not_there_yet(instance: Path, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        if len(asked) == 1:
            raise not_running(instance)
        return ask(instance, request)

    monkeypatch.setattr(start, "ask", not_there_yet)
    assert bench.json("start", *bench.serve)["data"]["already_running"] is True
    assert len(asked) > 1


def test_starting_while_the_old_one_stops_waits_for_it(bench: Bench) -> None:
    bench("start", *bench.serve)
    old = bench.json("status")["data"]["supervisor"]["pid"]
    slow = _connect_slowly(bench.port)
    with contextlib.closing(slow):
        _ask_to_stop(bench.instance)
        code, out, err = bench("start", *bench.serve)
    assert (code, err) == (0, "")
    assert "already" not in out
    assert bench.json("status")["data"]["supervisor"]["pid"] != old


def _connect_slowly(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(b"GET /slow HTTP/1.0\r\n\r\n")
    return sock


def _ask_to_stop(instance: Path) -> None:
    from mlx_launcher.supervisor import control

    assert control.call(str(instance), {"do": "stop", "timeout_s": 5.0})["ok"]


def test_a_taken_port_is_told_with_the_supervisors_words_and_code(bench: Bench) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", bench.port))
        stranger.listen()
        code, _, err = bench("start", *bench.serve)
    assert code == 5
    assert str(os.getpid()) in err
    assert err.count("\n") == 1


def test_a_killed_supervisor_is_not_running(bench: Bench) -> None:
    bench("start", *bench.serve)
    pid = remembered(bench.instance)["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while is_locked(bench.instance) and time.monotonic() < deadline:
        time.sleep(0.01)
    code, _, err = bench("status")
    assert code == 3
    assert f"(pid {pid}) was killed" in err
    assert bench("start", *bench.serve)[0] == 0


def test_a_long_state_directory(bench: Bench) -> None:
    bench.state_dir = bench.state_dir / ("d" * 200)
    bench.instance = bench.state_dir / str(bench.port)
    assert bench("start", *bench.serve)[0] == 0
    assert bench("status")[0] == 0
    assert bench("stop")[0] == 0


@pytest.mark.parametrize(
    ("option", "manner"), [([], ["--foreground"]), (["--service"], ["--service", "--idle"])], ids=["run", "service"]
)
def test_run_becomes_the_supervisor_and_hands_it_the_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, option: list[str], manner: list[str]
) -> None:
    class Replaced(BaseException):
        pass

    def execve(path: str, argv: list[str], environment: dict[str, str]) -> None:
        descriptor = int(argv[argv.index("--plan-fd") + 1])
        assert os.get_inheritable(descriptor)
        with open(descriptor, "rb", closefd=False) as file:
            plan = json.load(file)
        assert (path, plan["port"], plan["log_file"]) == (sys.executable, bench.port, "/logs/mine")
        assert argv[argv.index("--plan-fd") :] == ["--plan-fd", str(descriptor), *manner]
        assert not any(str(bench.port) in word for word in argv)
        assert "MLX_API_KEY" not in environment
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(Replaced):
        main(["--state-dir", str(bench.state_dir), "run", *bench.serve, "--log-file", "/logs/mine", *option])


def test_a_supervisor_that_says_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SUPERVISOR", [sys.executable, "-c", "pass"])
    code, _, err = bench("start", *bench.serve)
    assert code == 1
    assert "mlx-launch run" in err


def test_the_demo_is_built_where_it_is_served_from(bench: Bench) -> None:
    assert bench("start", "--demo", "--port", str(bench.port))[0] == 0
    model = bench.json("status")["data"]["model"]
    assert model == {"id": "demo", "path": str(bench.state_dir / "models" / "demo")}
    assert (Path(model["path"]) / "config.json").exists()


def test_a_demo_that_cannot_be_written(bench: Bench) -> None:
    bench.state_dir.mkdir()
    (bench.state_dir / "models").touch()
    code, _, err = bench("start", "--demo")
    assert code == 1
    assert "demo model cannot be written" in err


def test_nothing_is_started_from_a_directory_that_is_gone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, _, err = bench("start", *bench.serve)
    assert code == 1
    assert "directory is gone" in err


def test_a_supervisor_that_starts_where_modules_of_the_same_names_lie(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    (tmp_path / "socket.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    assert bench("start", *bench.serve)[0] == 0
