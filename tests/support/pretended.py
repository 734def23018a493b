"""A supervisor that is only pretended: it holds the lock, answers on the control socket, and switches as a test wants."""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Action = Callable[[], None]


def a_status(port: int, model_path: str, **changes: Any) -> dict[str, Any]:
    return {
        "state": "ready",
        "phase": None,
        "progress": None,
        "url": f"http://127.0.0.1:{port}/v1",
        "listener": "owned",
        "draining": False,
        "backend": "mlx",
        "configured_backend": "mlx",
        "rollback": None,
        "model": {"id": "model", "path": model_path},
        "server": None,
        "last_error": None,
        "reload": None,
        "port": port,
        **changes,
    }


class Pretended:
    """`asked` is what came over the socket, but for questions about the status.

    A switch or a restart ends as `outcome` says, after `before_outcome` was called: done, reverted or refused.
    """

    def __init__(self, instance: Path, status: dict[str, Any]) -> None:
        self.status = status
        self.asked: list[dict[str, Any]] = []
        self.outcome = "done"
        self.reason: str | None = None
        self.before_outcome: Action = lambda: None
        instance.mkdir(parents=True, exist_ok=True)
        self._lock = (instance / "lock").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.path.relpath(instance / "control.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._lock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, client.makefile("rwb") as stream:
                    answer = self._answer(json.loads(stream.readline()))
                    stream.write(json.dumps(answer).encode() + b"\n")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "status":
            reload = self.status["reload"]
            if reload and reload["state"] == "switching":
                seen = json.loads(json.dumps(self.status))
                self._end(reload)
                return {"ok": True, "data": seen}
            return {"ok": True, "data": self.status}
        self.asked.append(request)
        number = (self.status["reload"] or {"id": 0})["id"] + 1
        trigger = "rollback" if request["do"] == "switch" else "restart"
        self.status["reload"] = {"id": number, "trigger": trigger, "state": "switching", "reason": None, "hint": None}
        self.status.update(state="restarting", phase="loading")
        return {"ok": True, "data": {"reload_id": number}}

    def _end(self, reload: dict[str, Any]) -> None:
        self.before_outcome()
        reload.update(state=self.outcome, reason=self.reason)
        to = self.asked[-1].get("to")
        if self.outcome == "done" and to:
            there = "mlx-legacy" if to == "fallback" else self.status["configured_backend"]
            rollback = {"from": "mlx", "to": there, "at": "2026-11-22T14:00:00Z", "reason": "", "automatic": False}
            self.status.update(backend=there, rollback=rollback if to == "fallback" else None)
        self.status.update(state="degraded" if self.status["rollback"] else "ready", phase=None)


@contextlib.contextmanager
def pretended(state_dir: Path, port: int, model_path: str, **changes: Any) -> Iterator[Pretended]:
    supervisor = Pretended(state_dir / str(port), a_status(port, model_path, **changes))
    try:
        yield supervisor
    finally:
        supervisor.close()
