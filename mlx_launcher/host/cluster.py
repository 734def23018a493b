"""The leader of a cluster: the server process that the supervisor knows, with a rank on each machine. No mlx is in it.

    supervisor ── leader ─┬─ rank 0, here, with the listeners
                          ├─ further ranks here (tests, mostly)
                          └─ ssh ── guard ── rank N

A rank is our host with mlx-lm's server in it, on a channel to the leader as the leader is on one to the supervisor. To the
supervisor they are one server: rank 0's beats with a row for each rank, and one end, with the name of the rank at fault.
"""

import contextlib
import logging
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import psutil

from mlx_launcher.host import cluster_ring
from mlx_launcher.host.channel import Channel, Message
from mlx_launcher.host.cluster_rank import Rank
from mlx_launcher.host.logs import log_without_blocking

log = logging.getLogger("mlx_launcher.host")

TICK_S = 0.25
PING_S = 1.0
# What is wrong has to be named within ten seconds, whatever it is.
SILENT_S = 7.0
# Ranks that wait for each other connect within milliseconds, and begin at the same moment.
JOIN_S = 5.0
# A link between the ranks that is cut while all of them are there: a step of a large model may take long, too.
STUCK_S = 30.0
# An error in a rank may only show that another has died, which is told a moment later.
SYMPTOM_S = 1.0
# A tick that took this much longer than it should was a sleeping machine or a Ctrl-Z.
GAP_S = 2.0
END_S = 3.0
CACHE_SHARE = 8  # of this machine's memory, for the prompt cache of each rank; legacy_service's own, resolved for all
PHASES = ("importing", "loading", "proving")


class _FailedError(Exception):
    """The cluster cannot go on. `final`: nor will it when it is tried again. `frozen`: a rank stands still."""

    def __init__(self, reason: str, hint: str = "", final: bool = False, frozen: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.final, self.frozen = reason, hint, final, frozen


def run(channel: int, listeners: list[int]) -> NoReturn:
    """Leads until it is told to stop, then ends the process: 0 if it was told, 1 after a failure, which was said before."""
    log_without_blocking(sys.stderr.fileno())
    code = 1
    try:
        code = _Leader(Channel(channel), listeners).main()
    except Exception:
        log.exception("the leader failed")
    finally:
        logging.shutdown()
        os._exit(code)


class _Leader:
    """One loop owns all; the channels' threads only put what they hear into `_inbox`."""

    def __init__(self, channel: Channel, listeners: list[int]) -> None:
        self._channel = channel
        self._listeners = listeners
        # From whom: a rank, or None for the supervisor. None for a message is the end of that channel.
        self._inbox: queue.SimpleQueue[tuple[Rank | None, Message | None]] = queue.SimpleQueue()
        self._ranks: list[Rank] = []
        self._settings: Message = {}
        self._told_by: dict[str, dict[int, Any]] = {}  # by rank, what has to be the same on all machines
        self._now = 0.0  # seconds, without the gaps
        self._looked = time.monotonic()
        self._pinged = 0.0
        self._joining_s: float | None = None  # when the last rank began to join
        self._symptom: tuple[float, str] | None = None
        self._stopping = False
        self._phase: tuple[Any, ...] = ()

    def main(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._inbox.put((None, {"type": "stop"})))
        self._channel.listen(
            lambda message: self._inbox.put((None, message)), on_gone=lambda: self._inbox.put((None, None))
        )
        self._tell_phase("importing", None, None)
        try:
            while (code := self._round()) is None:
                pass
            return code
        except _FailedError as failed:
            log.error("%s. %s", failed.reason, failed.hint)
            kind = "fault" if failed.final else "dying"
            said = {"reason": failed.reason, "hint": failed.hint, "frozen": failed.frozen}
            self._channel.send({"type": kind, **said})
            return 1
        finally:
            self._end_all()

    def _round(self) -> int | None:
        """One look at what has come and what is due; the exit code when this is the end."""
        with contextlib.suppress(queue.Empty):
            who, message = self._inbox.get(timeout=TICK_S)
            if who is None:
                if (code := self._told(message)) is not None:
                    return code
            elif message is not None:
                self._heard(who, message)
        real = time.monotonic()
        elapsed, self._looked = real - self._looked, real
        self._now += elapsed if elapsed < GAP_S else TICK_S
        return self._look() if self._ranks else None

    # -- the supervisor

    def _told(self, message: Message | None) -> int | None:
        if message is None:
            return 1  # it died; the ranks go with us
        if message["type"] == "activate":
            self._settings = message["settings"]
            self._start()
        elif message["type"] in ("drain", "stop"):
            self._stopping = True
            if not self._ranks:
                return 0
            self._ranks[0].send(message)
        return None

    def _start(self) -> None:
        """Starts all ranks; they import, and wait for each other with everything else."""
        cluster = self._settings["cluster"]
        for number, member in enumerate(cluster["hosts"]):
            listeners = [] if number else self._listeners
            try:
                rank = Rank(number, member, cluster, listeners, self._put)
            except OSError as error:
                raise _FailedError(f"rank {number} on {member['host']} cannot be started: {error}") from None
            rank.told_s = self._now
            self._ranks.append(rank)
        # The port is to be free when rank 0 has ended, not when this process has.
        for listener in self._listeners:
            os.close(listener)

    def _put(self, rank: Rank, message: Message | None) -> None:
        self._inbox.put((rank, message))

    # -- the ranks

    def _heard(self, rank: Rank, message: Message) -> None:
        rank.told_s = self._now
        kind = message["type"]
        if kind == "began":
            rank.pid = message["pid"]
        elif kind == "exited":
            rank.exit = message["code"]
        elif kind == "beat":
            rank.beat = message
            if rank.number == 0:
                self._tell_work()
        elif kind == "phase":
            rank.phase = message
            if message["phase"] == "importing":
                rank.state = "importing"
            self._tell_progress()
        elif kind == "fault":
            rank.fault = message
        elif kind in ("imported", "joining", "joined", "ready"):
            self._on_step(rank, message)

    def _on_step(self, rank: Rank, message: Message) -> None:
        kind = message["type"]
        rank.state = "loading" if kind == "joined" else kind
        if kind == "imported":
            self._require_same(rank, "versions", message["versions"], "Install the same versions on all machines")
            if all(rank.state == "imported" for rank in self._ranks):
                self._activate()
        elif kind == "joining":
            hint = "Copy the model's directory from here to there"
            self._require_same(rank, "fingerprint", message["fingerprint"], hint)
            if all(rank.state == "joining" for rank in self._ranks):
                self._joining_s = self._now
        elif rank.number == 0 and kind == "ready":
            self._channel.send(message)

    def _require_same(self, rank: Rank, what: str, mine: Any, hint: str) -> None:
        """Refuses the rank, or one that was heard before, where it differs from rank 0."""
        told = self._told_by.setdefault(what, {})
        told[rank.number] = mine
        known = told.get(0, mine)
        for number, other in told.items():
            if other == known or 0 not in told:
                continue
            name = self._ranks[number].name
            if what == "fingerprint":
                raise _FailedError(f"{name} has another model at {self._settings['model_path']}", hint, final=True)
            unlike = [
                f"{key} {other.get(key)} instead of {known[key]}" for key in known if other.get(key) != known[key]
            ]
            raise _FailedError(f"{name} has other versions than rank 0: {', '.join(unlike)}", hint, final=True)

    def _activate(self) -> None:
        """All have imported: they get the model and each other's addresses at the same moment."""
        cluster = self._settings["cluster"]
        cache = dict(self._settings["cache"])
        # Where their bounds differed they would keep unlike entries, and then wait for each other for ever.
        cache["memory_bytes"] = cache["memory_bytes"] or psutil.virtual_memory().total // CACHE_SHARE
        for rank, membership in zip(self._ranks, cluster_ring.memberships(cluster), strict=True):
            rank.send({"type": "activate", "settings": {**self._settings, "cache": cache, "cluster": membership}})

    # -- what is due

    def _look(self) -> int | None:
        if self._now >= self._pinged + PING_S:
            self._pinged = self._now
            for rank in self._ranks:
                rank.send({"type": "ping"})
            if self._ranks[0].beat and self._now - self._ranks[0].told_s > PING_S:
                self._tell_work()  # it is silent, and its row has to say for how long
        if self._stopping:
            # The other ranks take part in what rank 0 still answers.
            code = self._ranks[0].code if self._ranks[0].state == "ready" else 0
            return code if code is None or code >= 0 else 1
        for trouble in self._troubles():
            raise trouble
        return None

    def _troubles(self) -> Iterator[_FailedError]:
        """What is wrong, the surest first."""
        for rank in self._ranks:
            if rank.fault is None and rank.ended() is not None:
                self._hear_the_rest()
                if rank.fault is None:
                    hint = "mlx-launch cluster check has the remedy" if rank.hopeless else ""
                    yield _FailedError(f"{rank.name}: {rank.ended()}", hint, final=rank.hopeless)
        for rank in self._ranks:
            if self._now - rank.told_s > SILENT_S and rank.state != "joining":
                what = f"{rank.name}: {_silence(rank)} for {SILENT_S:g} s"
                yield _FailedError(what, frozen=rank.state != "starting")
        if self._joining_s is not None and self._now - self._joining_s > JOIN_S:
            missing = [rank.name for rank in self._ranks if rank.state == "joining"]
            if missing:
                what = f"{', '.join(missing)}: no connection to the other ranks in {JOIN_S:g} s"
                yield _FailedError(what, cluster_ring.advice(self._settings["cluster"]))
            self._joining_s = None
        yield from self._stuck()
        for rank in self._ranks:
            if rank.fault is not None:
                yield from self._faulty(rank, rank.fault)

    def _stuck(self) -> Iterator[_FailedError]:
        """Nobody asks anything, and still the ranks do not get on: they do not hear each other."""
        first = self._ranks[0]
        idle = first.state == "ready" and not first.beat.get("in_flight") and not first.beat.get("queued")
        if idle and (first.beat.get("step_s") or 0.0) > STUCK_S:
            yield _FailedError(
                f"the ranks have not heard each other for {STUCK_S:g} s, and all are there",
                cluster_ring.advice(self._settings["cluster"]),
            )

    def _faulty(self, rank: Rank, fault: Message) -> Iterator[_FailedError]:
        if self._symptom is None:
            self._symptom = self._now, f"{rank.name}: {fault['reason']}"
        since, what = self._symptom
        if self._now > since + SYMPTOM_S:
            # What could not be joined may be there at the next try: a port that is still held, a rank that was late.
            again = rank.state == "joining" or all(other.state == "ready" for other in self._ranks)
            yield _FailedError(what, fault.get("hint", ""), final=not again)

    def _hear_the_rest(self) -> None:
        """What a rank said before it ended may still be on its way through the inbox."""
        deadline = time.monotonic() + TICK_S
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                who, message = self._inbox.get(timeout=left)
                if who is not None and message is not None and message["type"] in ("fault", "exited"):
                    self._heard(who, message)

    # -- what the supervisor is told

    def _tell_work(self) -> None:
        """Rank 0's last beat, with what is known of all ranks now."""
        self._channel.send({**self._ranks[0].beat, "ranks": [rank.row(self._now) for rank in self._ranks]})

    def _tell_progress(self) -> None:
        """The phase of the slowest rank, and the bytes of all."""
        said = [rank.phase for rank in self._ranks]
        phases = [PHASES.index(phase.get("phase", PHASES[0])) for phase in said]
        slowest = PHASES[min(phases) if self._ranks[0].phase.get("phase") != "proving" else 2]
        loading = [phase for phase in said if isinstance(phase.get("total"), int)]
        if slowest != "loading" or len(loading) < len(said):
            self._tell_phase(slowest, None, None)
        else:
            self._tell_phase(slowest, sum(p["done"] for p in loading), sum(p["total"] for p in loading))

    def _tell_phase(self, phase: str, done: int | None, total: int | None) -> None:
        if self._phase != (phase, done, total):
            self._phase = (phase, done, total)
            self._channel.send({"type": "phase", "phase": phase, "done": done, "total": total})

    # -- the end

    def _end_all(self) -> None:
        """Ends the ranks everywhere: asked first, because a killed process with wired memory may leak it on macOS."""
        for rank in self._ranks:
            rank.send({"type": "stop"})
            rank.hang_up()
        deadline = time.monotonic() + END_S
        while any(rank.code is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in self._ranks:
            rank.kill()


def _silence(rank: Rank) -> str:
    if rank.state == "starting":
        return "it cannot be reached: nothing was heard of it" if not rank.member["here"] else "it did not start"
    return "it froze: no sign of life"
