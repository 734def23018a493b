"""The real product as a user runs it: the command, the supervisor, mlx-textgen on MLX, a model built by the project."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from support.waiting import free_port

ROOT = Path(__file__).parents[2]


def processes_naming(text: str) -> list[psutil.Process]:
    """Every process whose command line or environment names `text`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if text in " ".join(process.cmdline()) or text in " ".join(process.environ().values()):
                found.append(process)
    return found


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def cached(self) -> int:
        return int(self.json["usage"]["prompt_tokens_details"]["cached_tokens"])


def http_request(
    port: int,
    path: str,
    body: Any = None,
    host: str = "127.0.0.1",
    timeout_s: float = 60.0,
    headers: dict[str, str] | None = None,
) -> Reply:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection.request(
            "GET" if body is None else "POST", path, raw, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def chat(port: int, content: Any, **fields: Any) -> Reply:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return http_request(port, "/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})


class Launcher:
    """`mlx-launch` with a state directory and a port of its own."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.port = free_port()

    def command(
        self, *arguments: str, timeout_s: float = 90.0, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "mlx_launcher", "--state-dir", str(self.state_dir), *arguments],
            env={**os.environ, "MLX_LAUNCH_TEST": str(self.state_dir), **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *arguments: str) -> None:
        done = self.command("start", "--port", str(self.port), *arguments)
        assert done.returncode == 0, done.stderr + done.stdout

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        return dict(json.loads(done.stdout)["data"])

    def server_pid(self) -> int:
        server = self.status()["server"]
        return int(server["pid"]) if server else 0

    def log(self) -> str:
        return (self.state_dir / str(self.port) / "server.log").read_text()

    def processes(self) -> list[psutil.Process]:
        return processes_naming(str(self.state_dir))

    def clean_up(self) -> None:
        self.command("stop", "--timeout", "5")
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


class Crowd:
    """Clients that ask without a pause until they are stopped; what went wrong is in `errors`."""

    def __init__(self, ask: Callable[[int], None], clients: int) -> None:
        self.answered = 0
        self.refused: list[str] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(ask, number), daemon=True) for number in range(clients)
        ]

    def _loop(self, ask: Callable[[int], None], number: int) -> None:
        while not self._stop.is_set():
            try:
                ask(number)
                self.answered += 1
            except ConnectionRefusedError as error:
                self.refused.append(repr(error))
            except Exception as error:
                self.errors.append(repr(error))

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client still waits for its answer"


def stream_events(raw: bytes) -> Iterator[Any]:
    """The events of a stream, which must be framed exactly."""
    text = raw.decode()
    assert text.endswith("\n\n")
    for event in text.removesuffix("\n\n").split("\n\n"):
        assert event.startswith(("data: ", ": ")), event
        assert "\n" not in event
        if event.startswith("data: "):
            payload = event.removeprefix("data: ")
            yield payload if payload == "[DONE]" else json.loads(payload)
