"""A server process from its first import to its last: phases, proof, uvicorn on the inherited sockets, beats, the end."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import uvicorn

from mlx_launcher.host.app import App
from mlx_launcher.host.channel import Channel, Message
from mlx_launcher.host.engine import Engine, Runtime
from mlx_launcher.host.errors import ModelFault
from mlx_launcher.host.logs import log_without_blocking
from mlx_launcher.host.proof import prove
from mlx_launcher.host.reports import Reports
from mlx_launcher.host.settings import Settings

log = logging.getLogger("mlx_launcher.host")

BEAT_S = 1.0
# A change of what is in flight is told between beats, at most this often.
CHANGE_S = 0.05
# How long clients that are being told of a stop may take to hear it.
STOP_GRACE_S = 3.0


def run(channel: int, listeners: list[int]) -> NoReturn:
    """Serves on the inherited descriptors until it is told to stop, then ends the process: 0 if it was told, 1 after a fault.

    It ends by `os._exit`: interpreter teardown after MLX has worked on another thread aborts (2 of 3 tries), which would look
    like a crash.
    """
    log_without_blocking(sys.stderr.fileno())
    code = 1
    try:
        host = _Host(Channel(channel), [socket.socket(fileno=descriptor) for descriptor in listeners])
        code = asyncio.run(host.main())
    except Exception:
        log.exception("the host failed")
    finally:
        logging.shutdown()
        os._exit(code)


def _runtime() -> Runtime:
    """Imports the backend: the engine calls this on its own thread, where MLX has to be imported."""
    try:
        from mlx_launcher.host.textgen import Textgen
    except ImportError as error:
        raise ModelFault(f"mlx-textgen cannot be imported: {error}", "Install mlx-launcher again.") from error
    return Textgen()


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: it re-raises the signal it was stopped by, which would look like a crash."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Host:
    """Joins the channel, the engine and the HTTP side; everything but the channel's thread runs on the event loop."""

    def __init__(self, channel: Channel, listeners: list[socket.socket]) -> None:
        self._channel = channel
        self._listeners = listeners
        self._reports = Reports(channel)

    async def main(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._stop, self._drain, self._changed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._activated: asyncio.Future[Settings] = self._loop.create_future()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._engine = Engine(
            _runtime,
            on_phase=self._reports.phase,
            on_loaded=lambda error: self._loop.call_soon_threadsafe(self._on_loaded, error),
            on_change=lambda: self._loop.call_soon_threadsafe(self._changed.set),
            on_death=self._engine_died,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._channel.listen(
            lambda message: self._loop.call_soon_threadsafe(self._on_message, message), on_gone=self._orphaned
        )
        self._engine.start()
        beats = asyncio.create_task(self._beat())
        try:
            return await self._live()
        except ModelFault as fault:
            log.error("%s. %s", fault.reason, fault.hint)
            self._channel.send({"type": "fault", "reason": fault.reason, "hint": fault.hint})
            return 1
        finally:
            beats.cancel()

    async def _live(self) -> int:
        starting = asyncio.create_task(self._start())
        told = asyncio.create_task(self._told_to_end())
        await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # Nothing was accepted yet: there is nothing to finish.
            return 0
        server = await starting
        serving = asyncio.create_task(server.serve(sockets=self._listeners))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        self._channel.send({"type": "ready", "took_s": round(time.monotonic() - self._began, 3)})
        log.info("ready")
        await told
        server.should_exit = True
        await self._finish(serving)
        self._tell()
        return 0

    async def _start(self) -> _Server:
        settings = await self._activated
        self._engine.activate(settings)
        await self._loaded
        app = App(self._engine, settings)
        self._reports.phase("proving", None, None)
        await prove(app, settings)
        self._engine.forget_proof()
        # What was imported and loaded stays: the collector need not walk through it again and again.
        gc.freeze()
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
        )
        return _Server(config)

    async def _told_to_end(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self._drain)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    async def _finish(self, serving: asyncio.Task[None]) -> None:
        """Ends the answers (a drain lets them finish, a stop ends them), then waits for the KV cache to be on the disk."""
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            self._engine.cancel_all()
            await asyncio.wait([serving], timeout=STOP_GRACE_S)
        self._engine.flush()
        while not self._engine.flushed:
            await asyncio.sleep(0.01)

    def _on_message(self, message: Message) -> None:
        if message["type"] == "activate" and not self._activated.done():
            self._activated.set_result(message["settings"])
        elif message["type"] == "drain":
            self._drain.set()
        elif message["type"] == "stop":
            self._stop.set()

    def _on_loaded(self, error: ModelFault | None) -> None:
        if error is None:
            self._loaded.set_result(None)
        else:
            self._loaded.set_exception(error)

    def _orphaned(self) -> None:
        """The supervisor died. The port is freed first: giving back a large model's memory may take the kernel seconds."""
        for listener in self._listeners:
            listener.close()
        os._exit(1)

    def _engine_died(self, what: str) -> None:
        """Without its engine the process can only hang: it ends, and the supervisor starts another."""
        log.error("the engine's thread ended: %s", what)
        self._channel.send({"type": "fault", "reason": f"the engine's thread ended: {what}", "hint": ""})
        self._orphaned()

    def _tell(self) -> None:
        self._reports.beat(self._engine.counters, self._engine.kv_cache(), self._engine.notes())

    async def _beat(self) -> None:
        while True:
            self._tell()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), BEAT_S)
                await asyncio.sleep(CHANGE_S)
