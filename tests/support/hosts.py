"""A real host process without a supervisor, for what the command has no flag for."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.waiting import until


class Host:
    """`with Host(model, port, cache_directory) as host`: ready inside, ended in order at the end."""

    def __init__(
        self,
        model: Path,
        port: int,
        cache_directory: Path,
        *,
        cache: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        max_file_bytes: int | None = None,
        deaf: bool = False,
        backend: str = "textgen",
        preexec: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        self.port = port
        self.phases: list[str] = []
        self.fault: str | None = None
        self.end: dict[str, Any] = {}  # what it said of its own end
        self.counters: dict[str, Any] = {}
        self.ready = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the host
        ours, theirs = socket.socketpair()
        if deaf:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        listener = socket.create_server(("127.0.0.1", port))
        self.process = subprocess.Popen(
            [
                *[sys.executable, "-m", "mlx_launcher.host", backend],
                *["--channel", str(theirs.fileno()), "--listen", str(listener.fileno())],
            ],
            pass_fds=[theirs.fileno(), listener.fileno()],
            env={**os.environ, **environment},
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
            preexec_fn=_limit_files(max_file_bytes) if max_file_bytes else preexec,
        )
        theirs.close()
        self.listener = listener  # kept, as by a supervisor
        self.channel = ours
        carried = {
            "model_path": str(model),
            "model_id": "m",
            "names": ["m"],
            "accept_any_model": True,
            "api_key": None,
            "require_key": False,
            "max_queue": 32,
            "max_body_bytes": 1 << 25,
            "prefill_batch": 512,
            "warmup": [],
            "cache": {
                "enabled": True,
                "dir": str(cache_directory),
                "slots": 10,
                "min_tokens": 100,
                "memory_bytes": None,
                "max_bytes": None,
                **(cache or {}),
            },
            **(settings or {}),
        }
        self.say({"type": "activate", "settings": carried})
        if not deaf:
            threading.Thread(target=self._read, daemon=True).start()

    def say(self, message: dict[str, Any]) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def log(self) -> str:
        self._output.seek(0)
        return self._output.read().decode()

    def _read(self) -> None:
        for line in self.channel.makefile("rb"):
            message = json.loads(line)
            if message["type"] == "phase":
                self.phases.append(message["phase"])
            elif message["type"] == "ready":
                self.ready = True
            elif message["type"] in ("fault", "dying"):
                self.fault, self.end = message["reason"], message
            elif message["type"] == "beat":
                self.counters = message

    def __enter__(self) -> "Host":
        until(lambda: self.ready or self.process.poll() is not None, 60, "ready")
        assert self.ready, self.log()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                self.say({"type": "drain"})
            assert self.process.wait(30) == 0, self.log()
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, where it still runs; there is nothing left of it then."""
        self.process.kill()
        self.process.wait()
        self.channel.close()
        self.listener.close()


def _limit_files(limit: int) -> Callable[[], None]:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return limit_files
