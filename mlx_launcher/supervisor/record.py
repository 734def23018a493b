"""What is known of the servers so far: what the one that runs has told, how its start went, how the last one ended."""

import time
from typing import Any

from mlx_launcher import system
from mlx_launcher.supervisor import status
from mlx_launcher.supervisor.journal import utc_now
from mlx_launcher.supervisor.process import Server, describe_exit
from mlx_launcher.supervisor.rules import Cause
from mlx_launcher.supervisor.totals import Totals


class Record:
    """`beat` is the last message of that type, `progress` how far a load is. `totals` and `restarts` are of all servers so far.

    Times are seconds on the loop's clock.
    """

    def __init__(self) -> None:
        self.beat: dict[str, Any] = {}
        self.progress: dict[str, int] | None = None
        self.last_exit: dict[str, Any] | None = None
        self._dying: str | None = None  # why the server said that it would end by itself
        self.start_s: float | None = None  # how long the last start took
        self.totals = Totals()
        self.restarts: dict[Cause, int] = {}
        self._begun = self._proved = False  # whether there was a server at all, and whether this one is ready
        self._asked_at = 0.0  # when it began
        self._unused_since = 0.0  # when there was work last, before the server was unloaded

    def begins(self, now: float, cause: Cause) -> None:
        """A server starts, and why, if it is not the first one."""
        if self._begun:
            self.restarts[cause] = self.restarts.get(cause, 0) + 1
        self.totals.ends()
        self._begun, self._proved = True, False
        self.beat = {"kv_cache": status.without_server(self.beat)["kv_cache"]}
        self.progress, self._asked_at = None, now
        self._dying = None

    def hear(self, beat: dict[str, Any]) -> None:
        if self._proved:
            self.beat = beat
            self.totals.heard(beat)
        else:  # it has not looked at the disk yet
            self.beat = {**beat, "kv_cache": beat.get("kv_cache") or self.beat.get("kv_cache")}

    def phase(self, message: dict[str, Any]) -> int | None:
        """A phase of a start; how many bytes are loaded, where it says so."""
        self.progress = status.progress(message)
        return self.progress["done"] if self.progress else None

    def ready(self, now: float) -> float:
        """A start has ended; how long it took."""
        self.progress, self.start_s, self._proved = None, round(now - self._asked_at, 3), True
        return self.start_s

    def says(self, message: dict[str, Any]) -> str:
        """Why the server will end, which counts more than its code."""
        self._dying = ". ".join(str(message[key]).rstrip(".") for key in ("reason", "hint") if message.get(key))
        return self._dying

    def exits(self, code: int, asked: str | None) -> str:
        """Why it ended: what it was `asked` to end for, or else what it said itself, or else what waitpid says."""
        self.totals.ends()
        self.beat = status.without_server(self.beat)
        self.last_exit = {"at": utc_now(), **describe_exit(code)}
        if (why := asked or self._dying) is not None:
            self.last_exit["reason"] = why
        return str(self.last_exit["reason"])

    def unloads(self, now: float) -> None:
        """No server runs before somebody asks."""
        self._unused_since = now - float(self.beat.get("idle_s", 0.0))

    def activity(self, now: float, idle: bool) -> dict[str, Any]:
        """The last beat; with `idle`, what the last server had done, and since when there has been nothing to do."""
        if not idle:
            return self.beat
        return {**self.beat, "idle_s": round(now - self._unused_since, 1)}

    def server(self, server: Server | None, restarts: int) -> status.ServerStatus | None:
        """What `status` shows of the one that runs."""
        if server is None:
            return None
        return {
            "pid": server.pid,
            "uptime_s": round(time.monotonic() - server.began, 1),
            "rss_bytes": self._rss_bytes(server),
            "restarts": restarts,
            "last_exit": self.last_exit,
        }

    def _rss_bytes(self, server: Server) -> int | None:
        """What it says itself; of a cluster, what all its processes on this machine have."""
        if not server.drains:
            return system.rss_bytes(server.pid)
        if not (ranks := self.beat.get("ranks")):
            return self.beat.get("rss_bytes")
        here = [rank["rss_bytes"] for rank in ranks if rank["rank"] in server.ranks_here]
        return sum(filter(None, [system.rss_bytes(server.pid), *here]))
