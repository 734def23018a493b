"""mlx-lm's own server with one model, and what it lacks as a server for others: limits, counters, proof, an end.

`mlx_lm.server` supplies the generation thread, batching, the prompt cache and the HTTP answers; `legacy_http.py` is its handler.
"""

import contextlib
import functools
import http.client
import json
import logging
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from mlx_lm import server as upstream
from mlx_lm.models.cache import LRUPromptCache

from mlx_launcher.host import legacy_harmony
from mlx_launcher.host.cluster_load import load_part
from mlx_launcher.host.engine import Counters, where
from mlx_launcher.host.errors import ModelFault, QueueFullError
from mlx_launcher.host.legacy_http import Handler
from mlx_launcher.host.settings import Settings
from mlx_launcher.host.weights import read_weights
from mlx_launcher.models.directory import BrokenModelError, check, read_config
from mlx_launcher.models.facts import context_length, vocabulary_size

log = logging.getLogger("mlx_launcher.host")

# As in mlx-textgen where a client names no limit; mlx-lm's own 512 cuts an agent's answers.
DEFAULT_MAX_TOKENS = 4096
# Of the machine's memory, for the prompt cache: mlx-lm's own has no bound in bytes.
CACHE_SHARE = 8
ACCEPT_POLL_S = 0.1

TellPhase = Callable[[str, int | None, int | None], None]


class Service:
    """One model behind HTTP. Made, it is loaded but accepts nothing; ModelFault where trying again cannot help.

    In a cluster that was joined it is this rank's part of the model; only rank 0 has listeners, the others do what it does.
    """

    def __init__(self, settings: Settings, listeners: list[socket.socket], tell: TellPhase) -> None:
        self.settings = settings
        self.counters = Counters()
        self.connections = 0
        self.stopping = False
        self._live = 0
        self._lock = threading.Lock()
        path = Path(settings["model_path"])
        try:
            total = check(path)
        except BrokenModelError as error:
            raise ModelFault(error.reason, error.hint) from None
        tell("loading", 0, total)
        arguments = _arguments(settings)
        self.provider = _Provider(arguments, functools.partial(tell, "loading"), total)
        cache = LRUPromptCache(arguments.prompt_cache_size, arguments.prompt_cache_bytes or sys.maxsize)
        self.generator = _Generator(self.provider, cache)
        if (fault := self.provider.loaded.get()) is not None:
            raise fault
        self.harmony = legacy_harmony.is_spoken_by(self.provider.tokenizer)
        config = read_config(path)
        self.context = context_length(config)
        self.vocabulary = vocabulary_size(config) or self.provider.tokenizer.vocab_size
        self.fingerprint = upstream.get_system_fingerprint()
        # Beyond this many at once requests wait in mlx-lm's own queue.
        self._width = arguments.decode_concurrency if self.provider.is_batchable else 1
        self._servers = [_Listening(listener, self) for listener in listeners]

    @property
    def alive(self) -> bool:
        return bool(self.generator.generation_available())

    @property
    def answering(self) -> int:
        """How many requests are being answered."""
        return self._live

    def prove(self) -> None:
        """Has a token generated through the way that requests take; raises ModelFault with the reason if none comes."""
        ours, theirs = socket.socketpair()
        self._servers[0].process_request(theirs, ("127.0.0.1", 0))
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1")) as connection:
            connection.sock = ours
            key = self.settings["api_key"]
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            reason = answer.get("error", {}).get("message", response.status)
            raise ModelFault(f"the model did not answer a request of one token: {reason}")
        if answer["usage"]["completion_tokens"] < 1:
            raise ModelFault("the model answered a request of one token without a token")
        self.counters = Counters()

    def accept(self) -> None:
        """Lets clients in."""
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(ACCEPT_POLL_S,), name="accept", daemon=True).start()

    def close(self) -> None:
        """Lets no more in; they wait for another server on the same sockets."""
        for server in self._servers:
            server.shutdown()
            server.socket.close()

    def cancel(self) -> None:
        """Ends all answers within one token or one prefill batch; clients are told."""
        self.stopping = True

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Around one request; raises QueueFullError when too many wait already."""
        with self._lock:
            if self._live >= self._width + self.settings["max_queue"]:
                raise QueueFullError(self._live - self._width)
            self._count(1)
            self.counters.requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._count(-1)

    def _count(self, change: int) -> None:
        self._live += change
        self.counters.in_flight = min(self._live, self._width)
        self.counters.queued = self._live - self.counters.in_flight
        self.counters.last_activity = time.monotonic()

    def connected(self, change: int) -> None:
        with self._lock:
            self.connections += change


class _Provider(upstream.ModelProvider):  # type: ignore[misc]
    """The one model, whatever a request names: mlx-lm's own drops it for another, and looks for that on the hub."""

    def __init__(self, arguments: Any, progress: Callable[[int, int], None], total: int) -> None:
        super().__init__(arguments)
        self.loaded: queue.SimpleQueue[ModelFault | None] = queue.SimpleQueue()
        self._progress = progress
        self._total = total

    def load_default(self) -> None:
        """Called on the generation thread, where MLX has to read the weights."""
        path = self.cli_args.model
        upstream.load = functools.partial(_LOAD, lazy=True)
        upstream.sharded_load = functools.partial(load_part, self._progress)
        try:
            self._load(path)
            if not self.is_distributed:
                read_weights(self.model, self._total, self._progress)
        except Exception as error:
            log.error("loading failed: %s", where(error))
            self.loaded.put(ModelFault(f"{path} cannot be loaded: {error}"))
        else:
            self.loaded.put(None)

    def load(self, *_: Any) -> Any:
        return self.model, self.tokenizer


_LOAD = upstream.load


class _Batches(upstream.BatchGenerator):  # type: ignore[misc]
    """Several answers at once, `step` called before each round of tokens or prefill."""

    def __init__(self, step: Callable[[], object], *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._step = step

    def next(self) -> Any:
        self._step()
        return super().next()


class _Generator(upstream.ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's generation, whose thread tells that it gets on: also while it waits for work, in step with the other ranks."""

    def __init__(self, provider: _Provider, cache: LRUPromptCache) -> None:
        self._stepped: float | None = time.monotonic()
        upstream.BatchGenerator = functools.partial(_Batches, self._step)
        super().__init__(provider, cache)

    @property
    def still_s(self) -> float:
        """Seconds since the last step; 0 where there is none to see, in an answer that mlx-lm gives by itself."""
        return 0.0 if self._stepped is None else time.monotonic() - self._stepped

    def _run_generate(self) -> None:
        try:
            self._generate()
        except Exception as error:
            log.error("the thread that generates failed: %s", where(error))
            self._generation_failed = True

    def _step(self) -> None:
        self._stepped = time.monotonic()

    def _share_object(self, shared: Any) -> Any:
        shared = super()._share_object(shared)
        self._step()
        return shared

    def _serve_single(self, *request: Any) -> None:
        self._stepped = None
        super()._serve_single(*request)
        self._step()

    def generate(self, request: Any, arguments: Any, progress_callback: Any = None) -> Any:
        context, answers = super().generate(request, arguments, progress_callback)
        if self._is_distributed and not self._is_batchable(arguments):
            # Rank 0 alone would leave such an answer, and wait for ranks that go on with it: it is brought to its end.
            context.stop = lambda: None
        return context, answers


def _arguments(settings: Settings) -> Any:
    """What mlx-lm's own `main` makes of its flags, with its defaults for all that is not said here."""
    taken: list[Any] = []
    cache = settings["cache"]
    in_memory = cache["memory_bytes"] or psutil.virtual_memory().total // CACHE_SHARE
    pipeline = settings.get("cluster", {}).get("strategy") == "pipeline"
    words = [
        f"--model={settings['model_path']}",
        "--allowed-origins=",  # by default it lets every page in a browser ask
        f"--max-tokens={DEFAULT_MAX_TOKENS}",
        f"--prefill-step-size={settings['prefill_batch']}",
        f"--prompt-cache-size={cache['slots'] if cache['enabled'] else 0}",
        # Ranks with unlike numbers of layers would drop unlike entries, and then wait for each other for ever.
        "--pipeline" if pipeline else f"--prompt-cache-bytes={in_memory}",
    ]
    kept = sys.argv, upstream.ModelProvider, upstream.run
    sys.argv = ["mlx_lm.server", *words]
    upstream.ModelProvider, upstream.run = lambda arguments: arguments, lambda _host, _port, given: taken.append(given)
    try:
        upstream.main()
    finally:
        sys.argv, upstream.ModelProvider, upstream.run = kept
    return taken[0]


class _Listening(ThreadingHTTPServer):
    """Accepts on a socket that somebody else has bound, listens on and keeps."""

    def __init__(self, listener: socket.socket, service: Service) -> None:
        super().__init__(("", 0), functools.partial(Handler, service), bind_and_activate=False)
        self._service = service
        self.socket.close()
        listener.setblocking(False)
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        # On macOS it has the listener's flag.
        connection.setblocking(True)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        self._service.connected(1)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._service.connected(-1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            log.error("a connection failed: %s", where(error))
