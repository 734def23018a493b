"""A legacy server process from its first import to its last: mlx-lm's own server on the inherited sockets.

It says and hears what the textgen host does, and never imports mlx-textgen: it is what is left when that one fails.

    main thread         beats, signals, what the supervisor says
    start thread        imports mlx-lm, waits until the model is loaded, proves it; then it ends
    mlx-lm's thread     loads the model and runs every generation
    one per listener    accepts; one per connection answers
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from mlx_launcher.host.channel import Channel, Message
from mlx_launcher.host.cluster_guard import SILENCE_S
from mlx_launcher.host.engine import Counters, where
from mlx_launcher.host.errors import ModelFault
from mlx_launcher.host.logs import log_without_blocking
from mlx_launcher.host.reports import Reports, versions
from mlx_launcher.host.settings import Settings

if TYPE_CHECKING:
    from mlx_launcher.host.legacy_service import Service

log = logging.getLogger("mlx_launcher.host")

BEAT_S = 1.0
CHANGE_S = 0.05  # changes of what is in flight are told at most this often
STOP_GRACE_S = 3.0  # how long clients that are being told of a stop may take to hear it
UNREAD_GRACE_S = 1.0  # how long a connection without a request may keep a drain waiting


def run(channel: int, listeners: list[int]) -> NoReturn:
    """Serves on the inherited descriptors until it is told to stop, then ends the process: 0 if it was told, 1 after a fault.

    By `os._exit`, as the textgen host does, and for the same reason.
    """
    log_without_blocking(sys.stderr.fileno())
    # mlx-lm's server logs to the root logger itself, bodies of requests that it cannot read among it.
    logging.getLogger().addFilter(lambda record: False)
    code = 1
    try:
        code = _Host(Channel(channel), [socket.socket(fileno=descriptor) for descriptor in listeners]).main()
    except Exception:
        log.exception("the host failed")
    finally:
        logging.shutdown()
        os._exit(code)


class _Host:
    """Joins the channel and the service. Whatever has to be decided comes to the main thread, through `_inbox`."""

    def __init__(self, channel: Channel, listeners: list[socket.socket]) -> None:
        self._channel = channel
        self._listeners = listeners
        # A SimpleQueue, because a signal may come while this thread is inside of it.
        self._inbox: queue.SimpleQueue[str | ModelFault | Service] = queue.SimpleQueue()
        self._activated: queue.SimpleQueue[Settings] = queue.SimpleQueue()
        self._counters = Counters()
        self._service: Service | None = None
        self._reports = Reports(channel)
        self._beat_told = 0.0
        self._unheard_s: float | None = None  # of a rank: since its leader spoke last

    def main(self) -> int:
        began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            # A rank without listeners is ended by its leader, after the rank that answers.
            signal.signal(number, (lambda *_: self._inbox.put("stop")) if self._listeners else signal.SIG_IGN)
        self._channel.listen(self._on_message, on_gone=self._orphaned)
        threading.Thread(target=self._start, name="start", daemon=True).start()
        while True:
            told = self._next(BEAT_S)
            if isinstance(told, ModelFault):
                log.error("%s. %s", told.reason, told.hint)
                self._channel.send({"type": "fault", "reason": told.reason, "hint": told.hint})
                return 1
            if told in ("stop", "drain"):
                if self._service is not None:
                    self._finish(self._service, told)
                    self._beat()
                return 0
            if told is not None and not isinstance(told, str):
                self._service = told
                self._counters = told.counters
                told.accept()
                self._channel.send({"type": "ready", "took_s": round(time.monotonic() - began, 3)})
                log.info("ready")

    def _start(self) -> None:
        try:
            self._reports.phase("importing", None, None)
            try:
                from mlx_launcher.host.legacy_service import Service
            except ImportError as error:
                raise ModelFault(f"mlx-lm cannot be imported: {error}", "Install mlx-launcher again.") from error
            self._channel.send({"type": "imported", "versions": versions()})
            settings = self._activated.get()
            if "cluster" in settings:
                self._unheard_s = 0.0
                from mlx_launcher.host.cluster_load import join

                join(settings["model_path"], settings["cluster"], self._channel.send)
            service = Service(settings, self._listeners, self._reports.phase)
            if self._listeners:
                self._reports.phase("proving", None, None)
                service.prove()
            self._inbox.put(service)
        except ModelFault as fault:
            self._inbox.put(fault)
        except Exception as error:
            self._inbox.put(ModelFault(f"{where(error)}: {error}"))

    def _next(self, timeout_s: float) -> "str | ModelFault | Service | None":
        """What is next in the inbox, or None after `timeout_s`; beats meanwhile, at once when what is in flight has changed."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now >= self._beat_told + BEAT_S or (self._changed() and now >= self._beat_told + CHANGE_S):
                self._beat()
            if self._service is not None and not self._service.alive:
                return ModelFault("the thread that generates ended")
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=min(CHANGE_S, max(0.0, deadline - now)))
            if time.monotonic() >= deadline:
                return None

    def _finish(self, service: "Service", told: str) -> None:
        """Ends the answers: a drain lets them finish, a stop ends them."""
        service.close()
        began = time.monotonic()
        deadline: float | None = None
        while service.answering or (service.connections and time.monotonic() < began + UNREAD_GRACE_S):
            if told == "stop" and deadline is None:
                service.cancel()
                deadline = time.monotonic() + STOP_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                return
            heard = self._next(CHANGE_S)
            if isinstance(heard, ModelFault):
                return
            told = heard if isinstance(heard, str) else told

    def _on_message(self, message: Message) -> None:
        if self._unheard_s is not None:
            self._unheard_s = 0.0
        if message["type"] == "activate":
            self._activated.put(message["settings"])
        elif message["type"] in ("drain", "stop"):
            self._inbox.put(message["type"])

    def _orphaned(self) -> None:
        """The supervisor died. The port is freed first: giving back a large model's memory may take the kernel seconds."""
        for listener in self._listeners:
            listener.close()
        os._exit(1)

    def _changed(self) -> bool:
        return self._counters.last_activity > self._beat_told

    def _beat(self) -> None:
        last, self._beat_told = self._beat_told, time.monotonic()
        if self._unheard_s is not None:
            # A machine that slept has not been left alone all that time.
            self._unheard_s += min(self._beat_told - last, 2 * BEAT_S)
            if self._unheard_s > SILENCE_S:
                # A leader that stands still: its group would never look idle to the supervisor, as ranks are always busy.
                self._orphaned()
        step_s = round(self._service.generator.still_s, 1) if self._service else None
        self._reports.beat(self._counters, None, [], step_s=step_s)
