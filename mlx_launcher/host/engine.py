"""The one thread that owns MLX, and the bounded queue in front of it.

MLX streams are thread-local since mlx 0.31.2: what is imported, loaded and run on one thread works, anything else is
"There is no Stream(gpu, 0) in current thread" (ml-explore/mlx issue 3727), so the thread imports mlx itself.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mlx_launcher.host.errors import ModelFault, QueueFullError, RequestError
from mlx_launcher.host.events import Event
from mlx_launcher.host.requests import Generation
from mlx_launcher.host.settings import Settings
from mlx_launcher.host.timings import Stopwatch, Timings

log = logging.getLogger("mlx_launcher.host")

# The last event of an answer is on its way to the client for about a millisecond; what can wait begins after that.
SETTLE_S = 0.05


@dataclass
class Counters:
    """What the beats tell the supervisor; every number only grows, but for `in_flight` and `queued`."""

    in_flight: int = 0
    queued: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    processed_tokens: int = 0  # prompt tokens run through the model: moves during a prefill
    last_activity: float = field(default_factory=time.monotonic)
    timings: Timings = field(default_factory=Timings)
    stopwatch: Stopwatch = field(init=False)  # of the request that runs; there is one at a time

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.timings)

    def prompted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt was read, and `cached_tokens` of it come from the KV cache."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.stopwatch.prompted(prompt_tokens, cached_tokens)

    def decoded(self) -> None:
        """A token of an answer is there."""
        self.completion_tokens += 1
        self.stopwatch.token()


@dataclass
class Job:
    """One request for the engine. `emit` is called on the engine's thread with each event or the error, and last with None."""

    request: Generation
    emit: Callable[[Event | RequestError | None], object]
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked_at: float = field(default_factory=time.monotonic)


class Runtime(Protocol):
    """What a server backend has to be for the engine. It is made and called on the engine's thread, but for `kv_cache`."""

    def load(self, settings: Settings, progress: Callable[[int, int], object]) -> None:
        """Loads the model, calling `progress(bytes done, bytes in all)`; raises ModelFault where trying again cannot help."""

    def generate(self, request: Generation, cancelled: threading.Event, counters: Counters) -> Iterator[Event]:
        """Yields the events of one request; looks at `cancelled` at least once a prefill batch and once a token."""

    def rest(self, wanted: threading.Event) -> float | None:
        """Called after each answer, and again while nobody asks: does a little of what can wait, and with `wanted` set only what
        cannot. Seconds until there is more to do, None for nothing before the next request."""

    def flush(self) -> None:
        """Brings to the disk what is only in memory: the server ends."""

    def kv_cache(self) -> dict[str, Any] | None:
        """What `status` shows of the KV cache; called from other threads, so it only reads."""

    def notes(self) -> list[str]:
        """What else `status` should say; called from other threads."""


class Engine:
    """Runs a Runtime on its own thread, one job at a time, with at most the settings' `max_queue` jobs waiting.

    `make_runtime`, `on_phase(phase, done, total)` and `on_loaded(fault or None)` are called on the engine's thread; `on_change`
    on any, whenever what is in flight or queued has changed; `on_death(what)` when the thread ends by something that was not
    foreseen.
    """

    def __init__(
        self,
        make_runtime: Callable[[], Runtime],
        on_phase: Callable[[str, int | None, int | None], object],
        on_loaded: Callable[[ModelFault | None], object],
        on_change: Callable[[], object],
        on_death: Callable[[str], object],
    ) -> None:
        self.counters = Counters()
        self._make_runtime = make_runtime
        self._on_phase = on_phase
        self._on_loaded = on_loaded
        self._on_change = on_change
        self._on_death = on_death
        self._runtime: Runtime | None = None
        self._activated: queue.SimpleQueue[Settings] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job | Literal["rest", "flush"]] = queue.SimpleQueue()
        self._wanted = threading.Event()  # somebody waits for the thread
        self._flushed = threading.Event()
        self._may_rest = False
        self._max_queue = 0
        self._live: dict[int, Job] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the thread, which imports the backend and then waits for `activate`."""
        threading.Thread(target=self._main, name="engine", daemon=True).start()

    def activate(self, settings: Settings) -> None:
        """Has the thread load the model as soon as its imports are done."""
        self._max_queue = settings["max_queue"]
        self._activated.put(settings)

    def forget_proof(self) -> None:
        """Starts the counters anew, so that they count what users ask; to be called before the first client is accepted.

        From here on the runtime may use the thread while nobody does.
        """
        self.counters = Counters()
        self._may_rest = True
        self._jobs.put("rest")

    def kv_cache(self) -> dict[str, Any] | None:
        return self._runtime.kv_cache() if self._runtime is not None else None

    def notes(self) -> list[str]:
        return self._runtime.notes() if self._runtime is not None else []

    def flush(self) -> None:
        """Has the thread bring the KV cache to the disk when its jobs are done; `flushed` tells."""
        self._jobs.put("flush")
        self._wanted.set()

    @property
    def flushed(self) -> bool:
        return self._flushed.is_set()

    def submit(self, job: Job) -> None:
        """Queues a job; raises QueueFullError beyond `max_queue` waiting ones."""
        with self._lock:
            # Whose client has left waits for nothing: it is dropped when its turn comes.
            wanted = sum(not other.cancelled.is_set() for other in self._live.values())
            if wanted > self._max_queue:
                raise QueueFullError(wanted - 1)
            self._live[id(job)] = job
            self._count(in_flight=self.counters.in_flight)
        self._jobs.put(job)
        self._wanted.set()

    def cancel_all(self) -> None:
        """Ends all work within one prefill batch or one token; each job is told by its final None."""
        with self._lock:
            for job in self._live.values():
                job.cancelled.set()

    def _main(self) -> None:
        try:
            self._on_phase("importing", None, None)
            runtime = self._make_runtime()
            settings = self._activated.get()
            self._on_phase("loading", None, None)
            runtime.load(settings, lambda done, total: self._on_phase("loading", done, total))
        except ModelFault as fault:
            self._on_loaded(fault)
            return
        except Exception as error:
            log.exception("loading failed")
            self._on_loaded(ModelFault(f"{type(error).__name__} while loading: {error}"))
            return
        self._runtime = runtime
        self._on_loaded(None)
        try:
            while True:
                job = self._next(runtime)
                if job == "flush":
                    runtime.flush()
                    self._flushed.set()
                elif job != "rest":
                    self._run(runtime, job)
                    if not self._jobs.empty():
                        self._rest(runtime)
        except BaseException as error:
            # Nothing would ever be answered again; the supervisor has to hear of it.
            self._on_death(where(error))
            raise

    def _next(self, runtime: Runtime) -> Job | Literal["rest", "flush"]:
        """The next job; until one comes, the runtime does what could wait."""
        wait: float | None = SETTLE_S
        while True:
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=wait)
            self._wanted.clear()
            if self._jobs.empty():
                wait = self._rest(runtime) if self._may_rest else None

    def _rest(self, runtime: Runtime) -> float | None:
        try:
            return runtime.rest(self._wanted)
        except Exception as error:
            # Nobody waits for it; the next request gets its own chance.
            log.error("work in the background failed: %s", where(error))
            return None

    def _run(self, runtime: Runtime, job: Job) -> None:
        with self._lock:
            self._count(in_flight=1)
        try:
            if not job.cancelled.is_set():
                self.counters.requests += 1
                self.counters.stopwatch = Stopwatch(self.counters.timings, job.asked_at)
                for event in runtime.generate(job.request, job.cancelled, self.counters):
                    job.emit(event)
        except RequestError as error:
            job.emit(error)
        except Exception as error:
            job.emit(unforeseen(error))
        finally:
            self.counters.stopwatch.over()
            with self._lock:
                self._live.pop(id(job), None)
                self._count(in_flight=0)
            job.emit(None)

    def _count(self, in_flight: int) -> None:
        self.counters.in_flight = in_flight
        self.counters.queued = len(self._live) - in_flight
        self.counters.last_activity = time.monotonic()
        self._on_change()


def where(error: BaseException) -> str:
    """The type and the place, never the message: it may quote a prompt."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} in {' > '.join(frames[-5:])}"


def unforeseen(error: Exception) -> RequestError:
    """What a client is told of an error that is the server's; the log is told where it was."""
    log.error("a request failed: %s", where(error))
    return RequestError(500, f"the engine failed on this request ({type(error).__name__})", code="engine_error")
