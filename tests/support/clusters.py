"""A cluster as a user runs it, on loopback or on network namespaces as machines, and how soon it names what is wrong."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from support.families import PROMPTS, TOKENS, reference
from support.launched import Launcher, Reply, chat
from support.waiting import until

T = TypeVar("T")
# What was broken, how many seconds it took until `status` named it, and what it said.
TABLE: list[tuple[str, float, str]] = []
NAMED_S = 10.0
READY_S = 90.0
_CLONE_NEWNET = 0x40000000


class Cluster(Launcher):
    """`mlx-launch` with a cluster as its only backend; in the namespace of that name, where one is given."""

    def __init__(
        self, directory: Path, model: Path, distributed: dict[str, Any], namespace: str = "", **block: Any
    ) -> None:
        super().__init__(directory / "state")
        self.namespace = namespace
        self.file = directory / "cluster.json"
        backend = {"port": self.port, "modelPath": str(model), "distributed": {"enabled": True, **distributed}, **block}
        self.file.write_text(json.dumps({"backend": "mlx-cluster", "backends": {"mlx-cluster": backend}}))

    def command(
        self, *arguments: str, timeout_s: float = READY_S, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return subprocess.run(
            [
                *[*inside, sys.executable, "-m", "mlx_launcher"],
                *["--config", str(self.file), "--state-dir", str(self.state_dir), *arguments],
            ],
            env={**os.environ, "MLX_LAUNCH_TEST": str(self.state_dir), **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def chat(self, content: Any, **fields: Any) -> Reply:
        return self.there(lambda: chat(self.port, content, **fields))

    def there(self, call: Callable[[], T]) -> T:
        """Calls in the cluster's namespace."""
        return inside(self.namespace, call) if self.namespace else call()

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank; namespaces share the numbers."""
        return psutil.Process(int(self.status()["ranks"][number]["pid"]))

    def ready(self, after: int = 0) -> dict[str, Any]:
        """The status once it is ready, by a server other than that of the pid `after`."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            good = status["state"] == "ready" and len(status["ranks"]) > 1 and status["server"]["pid"] != after
            return status if good else None

        found: dict[str, Any] = until(look, READY_S, "a cluster that is ready")
        return found

    def last(self) -> dict[str, Any]:
        """The status, also of one that gave up."""
        return dict(json.loads(self.command("status", "--json").stdout))

    def note(self, fault: str, began: float) -> None:
        """Puts what `status` says now into the table."""
        TABLE.append((fault, time.monotonic() - began, str(self.last()["data"].get("last_error"))))

    def named(self, fault: str, rank: str, began: float) -> str:
        """What `status` says of the rank, within ten seconds from when it was broken."""

        def look() -> str | None:
            error = str(self.status()["last_error"] or "")
            return error if rank in error else None

        said: str = until(look, NAMED_S - (time.monotonic() - began), f"the name of {rank}")
        TABLE.append((fault, time.monotonic() - began, said))
        return said


def turns() -> list[list[dict[str, Any]]]:
    """A conversation of each length, as it begins."""
    return [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def answers(cluster: Cluster) -> list[str]:
    return [cluster.chat(turn, max_tokens=TOKENS).text for turn in turns()]


def expected(model: Path) -> list[str]:
    """What one machine answers."""
    # mlx-lm's streaming detokenizer drops a leading space.
    return [text.removeprefix(" ") for text in reference(model, turns())]


def inside(namespace: str, call: Callable[[], T]) -> T:
    """Calls on a thread of its own whose sockets are in the namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{namespace}", "rb") as file:  # noqa: PTH123
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) == 0
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(READY_S)
    if errors:
        raise errors[0]
    assert results, "no answer"
    return results[0]


def missing() -> str:
    """What this machine lacks to have namespaces as machines; "" where it has all."""
    if os.name != "posix" or sys.platform != "linux" or os.getuid() != 0:
        return "only root on Linux can make network namespaces"
    wanted = {"ip": "iproute2", "ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server"}
    lacking = [package for program, package in wanted.items() if not shutil.which(program)]
    if lacking:
        return f"{', '.join(lacking)} not installed; scripts/cluster-hosts.sh does it"
    probe = subprocess.run(
        ["/bin/sh", "-c", "ip netns add mlxprobe && ip netns del mlxprobe"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else f"no network namespace can be made: {probe.stderr.decode().strip()}"


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout
