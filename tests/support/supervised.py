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
from pathlib import Path
from typing import Any

import psutil

from mlx_launcher.supervisor import control
from support.waiting import until

ROOT = Path(__file__).parents[2]
FAKE_HOST = ROOT / "tests" / "fakes" / "host.py"


def make_plan(instance: Path, port: int, *host_arguments: str, **changes: Any) -> dict[str, Any]:
    restart = {"max_restarts": 3, "window_s": 60.0, "backoff_s": 0.05, "backoff_max_s": 0.2}
    return {
        "schema": 1,
        "instance": str(instance),
        "hosts": ["127.0.0.1", "::1"],
        "port": port,
        "url": f"http://127.0.0.1:{port}/v1",
        "model": {"id": "fake", "path": "/models/fake"},
        "backend": {
            "name": "mlx",
            "kind": "host",
            "argv": [sys.executable, "-S", str(FAKE_HOST), *host_arguments],
            "env": {},
            "cwd": None,
            "settings": {"a": 1},
        },
        "fallback": None,
        "stop_timeout_s": 5.0,
        "hang_timeout_s": 120.0,
        "freeze_timeout_s": 30.0,
        "idle_timeout_s": 0.0,
        "restart": {**restart, **changes.pop("restart", {})},
        "log_file": str(instance / "server.log"),
        "log_max_bytes": 1 << 20,
        "source": {"argv": [], "cwd": "/", "env": {}},
        **changes,
    }


class Launched:
    """One supervisor process. `report` is what it said on its report descriptor, None with `foreground`."""

    def __init__(self, plan: dict[str, Any], foreground: bool = False, report: bool = True) -> None:
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
            self.process = subprocess.Popen(
                argv,
                pass_fds=[file.fileno(), write_end],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
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

    def refuses(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) != 0

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        with contextlib.suppress(OSError):
            for pid in self.server_pids():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
