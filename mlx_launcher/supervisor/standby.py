"""A second host that has imported everything and waits: what follows a crash is then a model load, not a start.

It holds no model before it is activated. Its deaths count for nothing but the pause before the next one.
"""

import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, TypedDict

from mlx_launcher.plan import Backend, Plan
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.process import Server, describe_exit

# Beats come once a second, while it imports too. One that is not heard of is stopped or stuck, and no help after a crash.
SILENT_S = 10.0
# It has nothing to finish: after SIGTERM it is gone at once, or does not react.
END_S = 2.0
# The pause after one that died by itself, doubled by each further one up to the second number.
PAUSE_S = (1.0, 60.0)
# One that lived for so long makes the pause short again.
STABLE_S = 60.0


class StandbyStatus(TypedDict):
    pid: int
    rss_bytes: int | None


class Standby:
    """At most one host beside the server, for the backend that it was started for. `tick` sees to it, `take` makes it the server.

    Times are seconds on the loop's clock. `write` gets its output.
    """

    def __init__(self, selector: selectors.BaseSelector, journal: Journal, write: Callable[[bytes], None]) -> None:
        self._selector, self._journal, self._write = selector, journal, write
        self._server: Server | None = None
        self._backend: Backend | None = None
        self._rss_bytes: int | None = None
        self._began = self._heard = 0.0
        self._now = 0.0
        self._kill_at: float | None = None  # while it is being ended
        self._deaths = 0
        self._not_before = 0.0

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    def seen(self) -> StandbyStatus | None:
        """What `status` shows of it."""
        return {"pid": self._server.pid, "rss_bytes": self._rss_bytes} if self._server else None

    def remembered(self) -> dict[str, Any] | None:
        """What a later supervisor needs to find it, should this one be killed."""
        return self._server.remembered() if self._server else None

    def tick(
        self, now: float, start: bool, plan: Plan, backend: Backend | None, listeners: list[socket.socket]
    ) -> None:
        """To be called after each round of events: ends one that is not for this backend; starts one for it, with `start`."""
        self._now = now
        if self._server is not None:
            self._look(self._server)
        if self._server is not None and self._kill_at is None:
            if backend is not self._backend:
                self._end("not wanted any more")
            elif now - self._heard > SILENT_S:
                self._died(f"nothing was heard of it for {SILENT_S:g} s")
                self._end("it is silent")
        if start and backend is not None and self._server is None and now >= self._not_before:
            self._spawn(plan, backend, listeners)

    def take(
        self, now: float, backend: Backend, hear: Callable[[dict[str, Any]], None], write: Callable[[bytes], None]
    ) -> Server | None:
        """The standby as the server that is needed now, to be activated as any other; None if there is none that is fit."""
        server = self._server
        if server is None or self._kill_at is not None or backend is not self._backend:
            return None
        if now - self._heard > SILENT_S or server.exit_code() is not None:
            return None
        self._server, self._deaths = None, 0
        server.hand_over(hear, write)
        return server

    def close(self) -> None:
        """Ends it now. Waits for that, for a moment: SIGKILL takes effect at once, except in an uninterruptible system call."""
        server, deadline = self._server, time.monotonic() + END_S
        if server is None:
            return
        server.signal_group(signal.SIGKILL)
        while (server.exit_code() is None or server.group_left()) and time.monotonic() < deadline:
            time.sleep(0.005)
        self._forget(server)

    def _spawn(self, plan: Plan, backend: Backend, listeners: list[socket.socket]) -> None:
        try:
            self._server = Server(plan, backend, listeners, self._selector, self._hear, self._write)
        except (OSError, ValueError) as error:
            self._died(f"it cannot be started: {error}")
            return
        self._backend, self._rss_bytes, self._kill_at = backend, None, None
        self._began = self._heard = self._now
        self._journal.note("standby", standby=self._server.pid, backend=backend["name"])

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard = self._now
        rss = message.get("rss_bytes")
        if message.get("type") == "beat" and isinstance(rss, int):
            self._rss_bytes = rss
        elif message.get("type") == "fault":
            self._journal.note("standby_fault", standby=self.pid, reason=str(message.get("reason")))

    def _look(self, server: Server) -> None:
        """Whether it is gone, or should be."""
        code = server.exit_code()
        if code is None:
            if self._kill_at is not None and self._now >= self._kill_at:
                self._kill_at = self._now + END_S
                server.signal_group(signal.SIGKILL)
            return
        if server.group_left():
            server.signal_group(signal.SIGKILL)
            return
        server.hear_last_words()
        if self._kill_at is None:
            self._died(describe_exit(code)["reason"])
        self._forget(server)

    def _end(self, why: str) -> None:
        self._journal.note("standby_end", standby=self.pid, reason=why)
        self._kill_at = self._now + END_S
        if self._server is not None:
            self._server.end("term")

    def _died(self, why: str) -> None:
        if self._server is not None and self._now - self._began >= STABLE_S:
            self._deaths = 0
        pause_s = min(PAUSE_S[0] * 2.0 ** min(self._deaths, 60), PAUSE_S[1])
        self._deaths += 1
        self._not_before = self._now + pause_s
        self._journal.note("standby_died", standby=self.pid, reason=why, pause_s=pause_s)

    def _forget(self, server: Server) -> None:
        self._server, self._backend, self._kill_at = None, None, None
        server.close()
