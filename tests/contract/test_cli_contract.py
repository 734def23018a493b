"""What scripts depend on: the JSON envelope, its error codes, the exit codes, and where each thing is written.

Add lines here, never change one.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.cli import main
from mlx_launcher.demo import build_random
from mlx_launcher.supervisor import status as supervisor_status

PORT = 18431
METRICS = {"content_type": "application/openmetrics-text; version=1.0.0; charset=utf-8", "text": "a 1\n# EOF\n"}
STOPPING = {"pid": 7, "stop_timeout_s": 30.0}
RELOAD = {"id": 1, "trigger": "restart", "state": "done", "reason": None, "hint": None, "exit": None, "changes": []}
# docs of `status`: the keys that are always there, null or not.
STATUS_KEYS = {
    "state": None,
    "phase": None,
    "url": None,
    "listener": None,
    "draining": None,
    "backend": None,
    "configured_backend": None,
    "rollback": None,
    "model": {"id", "path"},
    "supervisor": {"pid", "uptime_s", "rss_bytes"},
    "server": {"pid", "uptime_s", "rss_bytes", "restarts", "last_exit"},
    "activity": {
        "in_flight",
        "queued",
        "requests",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "idle_s",
    },
    "kv_cache": {"dir", "entries", "bytes", "limit_bytes"},
    "last_error": None,
}


class World:
    """A state directory, a model in it, and as many pretended supervisors as a test wants."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self.state_dir = root / "state"
        self.model = root / "model"
        build_random(self.model)
        self._stack = stack

    def status(self, port: int = PORT, **changes: Any) -> dict[str, Any]:
        plan = assemble(Flags(str(self.model), port), self.state_dir, Caller([], "/", {}))
        seen: supervisor_status.Seen = {
            "state": "ready",
            "phase": None,
            "progress": None,
            "draining": False,
            "last_error": None,
            "uptime_s": 5.0,
            "rss_bytes": 12_000_000,
            "server": {"pid": 2, "uptime_s": 4.0, "rss_bytes": 10**9, "restarts": 0, "last_exit": None},
            "standby": None,
            "start_s": 4.0,
            "service": False,
            "listener": "owned",
            "on_fallback": False,
            "rollback": None,
            "reload": None,
            "beat": {},
            "metrics": None,
            "events": [],
        }
        return {**supervisor_status.build(plan, seen), **changes}

    def runs(self, port: int = PORT, **changes: Any) -> None:
        """From here on a supervisor answers on this port, until it is asked to stop."""
        instance = self.state_dir / str(port)
        instance.mkdir(parents=True)
        lock = self._stack.enter_context((instance / "lock").open("wb"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.path.relpath(instance / "control.sock"))
        listener.listen()
        answers = {
            "status": self.status(port, **changes),
            "stop": STOPPING,
            "restart": {"reload_id": 1},
            "metrics": METRICS,
        }

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, client.makefile("rwb") as stream:
                        do = json.loads(stream.readline())["do"]
                        stream.write(json.dumps({"ok": True, "data": answers[do]}).encode())
                        stream.write(b"\n")
                    if do == "stop":
                        listener.close()
                        lock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.push(lambda *_: _wake(listener))

    def ended(self, port: int = PORT, **changes: Any) -> None:
        """A supervisor ran on this port, and this is the last that it wrote."""
        instance = self.state_dir / str(port)
        instance.mkdir(parents=True)
        state = {"schema": 1, "pid": 4711, "pid_started": 1.0, "server": None, "status": self.status(port, **changes)}
        (instance / "state.json").write_text(json.dumps(state))
        (instance / "server.log").write_text("first\nlast words\n")


def _wake(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("MLX_API_KEY", "MLX_LAUNCH_CONFIG", "ANYCLAUDE_MODE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where there is no configuration
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        yield World(tmp_path, stack)


Prepare = Callable[[World], None]


def nothing(world: World) -> None:
    pass


def ready(world: World) -> None:
    world.runs()


def loading(world: World) -> None:
    world.runs(state="starting", phase="loading", progress={"done": 1, "total": 2})


def restarted(world: World) -> None:
    world.runs(reload=RELOAD)


def refused(world: World) -> None:
    world.runs(reload={**RELOAD, "state": "refused", "reason": "no model", "hint": "Name one", "exit": 4})


def reverted(world: World) -> None:
    world.runs(reload={**RELOAD, "state": "reverted", "reason": "torn", "hint": "", "exit": 1})


def two(world: World) -> None:
    world.runs(PORT)
    world.runs(PORT + 1)


def failed(world: World) -> None:
    world.ended(state="failed", last_error="the weights are torn")


def stopped(world: World) -> None:
    world.ended(state="stopped")


def killed(world: World) -> None:
    world.ended(state="ready")


SERVE = ["--model", "model", "--port", str(PORT)]

Case = tuple[Prepare, list[str], int, list[str]]
CASES: list[Case] = [
    (nothing, ["status"], 3, ["not_running"]),
    (nothing, ["status", "--port", "9"], 3, ["not_running"]),
    (nothing, ["stop"], 0, []),
    (nothing, ["logs"], 3, ["not_running"]),
    (nothing, ["metrics"], 3, ["not_running"]),
    (nothing, ["status", "--watch"], 3, ["not_running"]),
    (nothing, ["restart"], 3, ["not_running"]),
    (restarted, ["restart"], 0, []),
    (refused, ["restart"], 4, ["refused"]),
    (reverted, ["restart"], 1, ["reverted"]),
    (two, ["restart"], 2, ["several"]),
    (nothing, ["bogus"], 2, ["usage"]),
    (nothing, [], 2, ["usage"]),
    (nothing, ["status", "--bogus"], 2, ["usage"]),
    (nothing, ["status", "surplus"], 2, ["usage"]),
    (nothing, ["status", "--port", "0"], 2, ["usage"]),
    (nothing, ["start"], 2, ["usage"]),
    (nothing, ["start", "--demo", "--model", "model"], 2, ["usage"]),
    (nothing, ["start", "--model", "model", "--timeout", "soon"], 2, ["usage"]),
    (nothing, ["start", "--model", "model", "--host", "example.org"], 2, ["usage"]),
    (nothing, ["start", "--model", "model", "--mode", "nope"], 4, ["unknown_mode"]),
    (nothing, ["start", "--model", "model", "--mode", "claude"], 1, ["nothing_to_start"]),
    (nothing, ["bench"], 2, ["usage"]),
    (nothing, ["bench", "--demo", "--backends", "mlx,"], 2, ["usage"]),
    (nothing, ["bench", "--demo", "--plot", "bench.gif"], 2, ["usage"]),
    (nothing, ["bench", "--model", "nowhere"], 1, ["model_not_found"]),
    (nothing, ["plan"], 2, ["usage"]),
    (nothing, ["service"], 2, ["usage"]),
    (nothing, ["service", "status"], 3, ["not_installed"]),
    (nothing, ["service", "status", "--port", "9"], 3, ["not_installed"]),
    (nothing, ["service", "uninstall"], 0, []),
    (nothing, ["service", "print"], 2, ["usage"]),
    (nothing, ["service", "print", "--model", "model"], 0, []),
    (nothing, ["service", "install", "--model", "model", "--mode", "nope"], 4, ["unknown_mode"]),
    (nothing, ["service", "install", *SERVE, "--dry-run"], 0, []),
    (ready, ["service", "install", *SERVE, "--dry-run"], 1, ["already_running"]),
    (nothing, ["config"], 2, ["usage"]),
    (nothing, ["config", "path"], 1, ["no_config"]),
    (nothing, ["config", "validate"], 1, ["no_config"]),
    (nothing, ["config", "show"], 0, []),
    (nothing, ["config", "show", "--mode", "nope"], 4, ["unknown_mode"]),
    (nothing, ["config", "schema"], 0, []),
    (nothing, ["config", "init", "model"], 1, ["file_exists"]),
    (nothing, ["start", "--model", "nowhere"], 1, ["model_not_found"]),
    (nothing, ["start", "--model", "."], 1, ["model_incomplete"]),
    (nothing, ["start", "--model", "model", "--host", "0.0.0.0"], 1, ["key_required"]),
    (ready, ["status"], 0, []),
    (ready, ["start", *SERVE], 0, []),
    (ready, ["start", *SERVE, "--no-wait"], 0, []),
    (ready, ["start", *SERVE, "--host", "127.0.0.2"], 1, ["other_settings"]),
    (ready, ["stop"], 0, []),
    (ready, ["logs"], 1, ["no_log"]),
    (loading, ["status"], 0, []),
    (loading, ["start", *SERVE, "--timeout", "0"], 6, ["not_ready"]),
    (two, ["status"], 2, ["several"]),
    (two, ["stop"], 2, ["several"]),
    (two, ["logs"], 2, ["several"]),
    (two, ["status", "--port", str(PORT)], 0, []),
    (ready, ["metrics"], 0, []),
    (two, ["metrics"], 2, ["several"]),
    (stopped, ["metrics"], 3, ["not_running"]),
    (failed, ["metrics"], 3, ["not_running"]),
    (failed, ["status", "--watch"], 3, ["failed"]),
    (failed, ["status"], 3, ["failed"]),
    (failed, ["stop"], 0, []),
    (failed, ["logs"], 0, []),
    (stopped, ["status"], 3, ["not_running"]),
    (killed, ["status"], 3, ["not_running"]),
]
# What never ends has no JSON to give.
JSON_CASES: list[Case] = [
    *CASES,
    (nothing, ["run", "--model", "model"], 2, ["usage"]),
    (ready, ["logs", "-f"], 2, ["usage"]),
]


def case_id(case: Case) -> str:
    return f"{case[0].__name__}-{' '.join(case[1])}"


def invoke(world: World, arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["--state-dir", str(world.state_dir), *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(("prepare", "arguments", "exit_code", "codes"), JSON_CASES, ids=map(case_id, JSON_CASES))
@pytest.mark.parametrize("json_first", [True, False], ids=["json-before", "json-after"])
def test_json(
    prepare: Prepare,
    arguments: list[str],
    exit_code: int,
    codes: list[str],
    json_first: bool,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(world)
    got = invoke(world, ["--json", *arguments] if json_first else [*arguments, "--json"])
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    envelope = json.loads(out)
    assert list(envelope) == ["schema", "command", "ok", "data", "errors"]
    assert (got, [error["code"] for error in envelope["errors"]]) == (exit_code, codes)
    assert envelope["schema"] == 1
    assert envelope["command"] == (arguments[0] if arguments and arguments[0] != "bogus" else None)
    assert envelope["ok"] is (exit_code == 0)
    assert isinstance(envelope["data"], dict)
    assert all(list(error) == ["code", "message", "hint"] for error in envelope["errors"])
    assert err.count("\n") == len(codes)


@pytest.mark.parametrize(("prepare", "arguments", "exit_code", "codes"), CASES, ids=map(case_id, CASES))
def test_an_error_is_one_line_on_stderr(
    prepare: Prepare,
    arguments: list[str],
    exit_code: int,
    codes: list[str],
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(world)
    assert invoke(world, arguments) == exit_code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    if codes:
        assert err.startswith("mlx-launch: ")
        assert err.endswith(".\n")
        assert err.count("\n") == 1
    else:
        assert err == ""
        assert out


@pytest.mark.parametrize("arguments", [["status"], ["start", *SERVE], ["start", *SERVE, "--no-wait"]])
def test_the_keys_of_a_status(arguments: list[str], world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.runs()
    invoke(world, ["--json", *arguments])
    data = json.loads(capsys.readouterr().out)["data"]
    for key, inner in STATUS_KEYS.items():
        assert key in data
        assert inner is None or data[key].keys() == inner
    assert data.get("already_running") is (None if arguments == ["status"] else True)


def test_a_server_that_gave_up_still_has_a_status(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    failed(world)
    invoke(world, ["--json", "status"])
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["data"].keys() >= STATUS_KEYS.keys()
    assert "the weights are torn" in envelope["errors"][0]["message"]


def test_what_stop_and_logs_answer(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def data(*arguments: str) -> Any:
        invoke(world, ["--json", *arguments])
        return json.loads(capsys.readouterr().out)["data"]

    world.runs()
    log = world.state_dir / str(PORT) / "server.log"
    log.write_text("one\ntwo\n")
    journal = log.with_name("journal.jsonl")
    journal.write_text('{"at": "2026-11-22T14:00:00Z", "event": "ready"}\n')
    assert data("logs") == {"file": str(log), "lines": ["one", "two"]}
    events = [{"at": "2026-11-22T14:00:00Z", "event": "ready"}]
    assert data("logs", "--supervisor") == {"file": str(journal), "events": events}
    assert data("metrics") == METRICS
    assert data("stop") == {"stopped": True, "pid": 7}
    assert data("stop") == {"stopped": False, "pid": None}


def test_version_and_help_are_no_errors(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["start", "--help"]):
        assert invoke(world, arguments) == 0
        out, err = capsys.readouterr()
        assert out
        assert not err
