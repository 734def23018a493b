"""A real supervisor process with a fake host, and how a test waits for it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_launcher.supervisor import control
from support.waiting import free_port, until

ROOT = Path(__file__).parents[2]
FAKE_HOST = ROOT / "tests" / "fakes" / "host.py"
FAKE_SCRIPT = ROOT / "tests" / "fakes" / "script.py"
Preexec = Callable[[], None] | None
# What makes the next plan: prints a file, and exits as another one says.
PLANNER = ["sh", "-c", 'echo planning >&2; cat "$0" && exit "$(cat "$0.exit")"']


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def instance(tmp_path: Path, port: int) -> Path:
    return tmp_path / "state" / str(port)


@pytest.fixture
def launch(instance: Path, port: int) -> "Iterator[Callable[..., Launched]]":
    """Starts a supervisor: `launch("--host-argument", …, plan_key=value, foreground=…)`. Kills what the test leaves."""
    all_of_them: list[Launched] = []

    def start(
        *host_arguments: str,
        foreground: bool = False,
        report: bool = True,
        preexec: Preexec = None,
        idle: bool = False,
        managed: dict[str, str] | None = None,
        **changes: Any,
    ) -> Launched:
        plan = make_plan(Path(changes.pop("instance", instance)), changes.pop("port", port), *host_arguments, **changes)
        all_of_them.append(Launched(plan, foreground, report, preexec, idle, managed))
        return all_of_them[-1]

    yield start
    for launched in all_of_them:
        launched.clean_up()


def fake_host(*arguments: str) -> dict[str, Any]:
    return {
        "name": "mlx",
        "kind": "host",
        "argv": [sys.executable, "-S", str(FAKE_HOST), *arguments],
        "env": {},
        "cwd": None,
        "settings": {"a": 1, "api_key": None},
    }


def fake_script(port: int, *arguments: str, api_key: str | None = None) -> dict[str, Any]:
    """A backend that binds the port itself."""
    return {
        "name": "mine",
        "kind": "script",
        "argv": [sys.executable, str(FAKE_SCRIPT), "--port", str(port), *arguments],
        "env": {"GREETING": "of the plan"},
        "cwd": "/",
        "settings": {"model_id": "fake", "names": ["fake"], "api_key": api_key},
    }


def make_plan(instance: Path, port: int, *host_arguments: str, **changes: Any) -> dict[str, Any]:
    restart = {"max_restarts": 3, "window_s": 60.0, "backoff_s": 0.05, "backoff_max_s": 0.2}
    return {
        "schema": 1,
        "instance": str(instance),
        "hosts": ["127.0.0.1", "::1"],
        "port": port,
        "url": f"http://127.0.0.1:{port}/v1",
        "model": {"id": "fake", "path": "/models/fake"},
        "backend": fake_host(*host_arguments),
        "fallback": None,
        "stop_timeout_s": 5.0,
        "hang_timeout_s": 120.0,
        "freeze_timeout_s": 30.0,
        "idle_timeout_s": 0.0,
        "standby": False,
        "memory_limit_bytes": None,
        "metrics_port": None,
        "restart": {**restart, **changes.pop("restart", {})},
        "log_file": str(instance / "server.log"),
        "log_max_bytes": 1 << 20,
        "source": {
            "argv": [*PLANNER, f"{instance}.next"],
            "cwd": "/",
            "env": {"PATH": os.environ["PATH"]},
        },
        "notes": [],
        **changes,
    }


class Launched:
    """One supervisor process. `report` is what it said on its report descriptor, None with `foreground`.

    `managed` are the variables with which a service manager starts it, None where none does.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        foreground: bool = False,
        report: bool = True,
        preexec: Preexec = None,
        idle: bool = False,
        managed: dict[str, str] | None = None,
    ) -> None:
        self.plan = plan
        self.port: int = plan["port"]
        self.instance = Path(plan["instance"])
        read_end, write_end = os.pipe()
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(plan).encode())
            file.flush()
            argv = [sys.executable, "-m", "mlx_launcher.supervisor", "--plan-fd", str(file.fileno())]
            argv += ["--report-fd", str(write_end)] if report else []
            argv += ["--foreground"] if foreground else []
            argv += ["--idle"] if idle else []
            argv += ["--service"] if managed is not None else []
            self.process = subprocess.Popen(
                argv,
                pass_fds=[file.fileno(), write_end],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(managed or {})},
                start_new_session=True,
                preexec_fn=preexec,
            )
        os.close(write_end)
        with os.fdopen(read_end) as reports:
            text = reports.read() if report else ""
        self.report: dict[str, Any] | None = json.loads(text) if text else None

    def status(self) -> dict[str, Any]:
        answer = control.call(str(self.instance), {"do": "status"})
        assert answer["ok"] is True
        return dict(answer["data"])

    def until_state(self, state: str, timeout_s: float = 10.0) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            status = self.status()
            return status if status["state"] == state else None

        return dict(until(there, timeout_s, f"state {state}"))

    def until_restarts(self, count: int) -> None:
        until(lambda: (self.status()["server"] or {}).get("restarts") == count, what=f"restart {count}")

    def get(self, path: str = "/pid", host: str = "127.0.0.1") -> str:
        connection = http.client.HTTPConnection(host, self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def provoke(self, path: str) -> None:
        """A request that the server is not expected to answer."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.get(path)

    def stop(self, timeout_s: float | None = None) -> int:
        request = {"do": "stop"} if timeout_s is None else {"do": "stop", "timeout_s": timeout_s}
        control.call(str(self.instance), request)
        return self.process.wait(15)

    def plan_next(self, **changes: Any) -> None:
        """What the configuration says from here on."""
        self.say_next({"schema": 1, "command": "plan", "ok": True, "data": {**self.plan, **changes}, "errors": []})

    def refuse_next(self, message: str, hint: str, exit_code: int) -> None:
        errors = [{"code": "config", "message": message, "hint": hint}]
        self.say_next({"schema": 1, "command": "plan", "ok": False, "data": {}, "errors": errors}, exit_code)

    def say_next(self, envelope: Any, exit_code: int = 0) -> None:
        file = Path(f"{self.instance}.next")
        file.write_text(envelope if isinstance(envelope, str) else json.dumps(envelope))
        Path(f"{file}.exit").write_text(str(exit_code))

    def restart(self) -> dict[str, Any]:
        """The outcome of a restart, once there is one."""
        number = control.call(str(self.instance), {"do": "restart"})["data"]["reload_id"]
        return self.until_reloaded(number)

    def until_reloaded(self, number: int) -> dict[str, Any]:
        def outcome() -> Any:
            reload = self.status()["reload"]
            return reload and reload["id"] == number and reload["state"] not in ("planning", "switching") and reload

        return dict(until(outcome, 15.0, f"the outcome of reload {number}"))

    def state_file(self) -> dict[str, Any]:
        return dict(json.loads((self.instance / "state.json").read_text()))

    def journal(self) -> list[dict[str, Any]]:
        path = self.instance / "journal.jsonl"
        if not path.is_file():  # a test put /dev/full there, which has no end
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def events(self) -> list[str]:
        return [line["event"] for line in self.journal()]

    def server_pids(self) -> list[int]:
        return [line["server"] for line in self.journal() if line["event"] == "spawn"]

    def standby_pids(self) -> list[int]:
        return [line["standby"] for line in self.journal() if line["event"] == "standby"]

    def refuses(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) != 0

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        with contextlib.suppress(OSError):
            for pid in (*self.server_pids(), *self.standby_pids()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
