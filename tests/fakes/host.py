"""A server that speaks the host's side of the channel and does what its arguments say. Standard library only; quick to start.

As the real ones it waits for `activate` between importing and loading; a standby is one that waits for long.

`GET /pid` (any other path too) answers with its pid; `/die` exits with 3, `/kill` is SIGKILL, `/freeze` SIGSTOP, `/exit0` exits
with 0, `/fault` reports a fault and exits with 1, `/slow` answers after a second, `/flood?N` writes N bytes of log first,
`/line?N` N bytes of binary without a newline, `/busy?N` answers after N tenths of a second in which its counters move, `/hang`
never, `/spin?N` after N tenths of a second without a beat and with a busy processor, `/rss?N` reports N bytes from then on.
"""

import argparse
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

arguments = argparse.ArgumentParser()
arguments.add_argument("--channel", type=int, required=True)
arguments.add_argument("--listen", required=True)
arguments.add_argument("--loading-s", type=float, default=0.0, help="report loading for that long before proving")
arguments.add_argument(
    "--die", choices=("importing", "loading", "proving", "ready"), help="SIGKILL itself in that phase"
)
arguments.add_argument("--linger", choices=("importing", "loading", "proving"), help="stay in that phase for a second")
arguments.add_argument("--die-after", type=float, help="exit with 3 that many seconds after ready")
arguments.add_argument("--fault", help="report this fault instead of ready, and exit with 1")
arguments.add_argument("--fault-if", help="report a fault if this file exists")
arguments.add_argument("--silent", action="store_true", help="say nothing while loading")
arguments.add_argument("--secret", help="is ignored")
arguments.add_argument("--die-waiting", action="store_true", help="exit with 3 if nobody activates it at once")
arguments.add_argument("--ignore-sigterm", action="store_true")
arguments.add_argument("--ignore-channel", action="store_true", help="never read it, not even its end")
arguments.add_argument(
    "--grandchild", help="leave a process that sleeps, holds the pipe, ignores SIGTERM; its pid goes here"
)
arguments.add_argument("--garbage", action="store_true", help="send lines on the channel that are not messages")
arguments.add_argument("--counts", action="store_true", help="tell of each request as of an answer of four tokens")
options = arguments.parse_args()

channel = socket.socket(fileno=options.channel)
channel.set_inheritable(False)
listeners = [socket.socket(fileno=int(fd)) for fd in options.listen.split(",")]
for listener in listeners:
    listener.set_inheritable(False)
write_lock = threading.Lock()
count_lock = threading.Lock()
in_flight = 0
served = 0
processed = 0
rss = 4096
mute = False
loaded = False
draining = False
last_activity = time.monotonic()


def send(**message: object) -> None:
    with write_lock:
        channel.sendall(json.dumps(message).encode() + b"\n")


def phase(name: str, done: int | None = None) -> None:
    send(type="phase", phase=name, done=done, total=None if done is None else 100)
    if options.die == name:
        os.kill(os.getpid(), signal.SIGKILL)
    if options.linger == name:
        time.sleep(1)


def beat() -> None:
    if mute:
        return
    counts: dict[str, object] = {"in_flight": in_flight, "queued": 0, "requests": served, "processed_tokens": processed}
    counts["open"] = in_flight
    kv_cache = {"dir": "/kv", "entries": 1, "bytes": 2, "limit_bytes": 3, "memory_bytes": 4} if loaded else None
    idle_s = round(time.monotonic() - last_activity, 2)
    if options.counts:
        waits = {"counts": [served] + [0] * 14, "sum": served / 100}
        tokens = {"counts": [0] * 15 + [3 * served], "sum": served * 9.0}
        counts["timings"] = {"first_token_cold_s": waits, "token_s": tokens}
        counts |= {"answers": {"ok": served}, "completion_tokens": 4 * served}
    send(type="beat", rss_bytes=rss, kv_cache=kv_cache, notes=[], idle_s=idle_s, **counts)


def leave_grandchild() -> None:
    ignore = "import signal,time; signal.signal(15, signal.SIG_IGN); print('grandchild', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", ignore])
    Path(options.grandchild).write_text(str(child.pid))


def start_up() -> None:
    global last_activity, loaded
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("fake host", os.getpid(), flush=True)
    phase("importing")
    if options.grandchild:
        leave_grandchild()
    if not options.ignore_channel:
        wait_for_activation()
    began = time.monotonic()
    phase("loading", 0)
    while (passed := time.monotonic() - began) < options.loading_s:
        if not options.silent:
            phase("loading", int(100 * passed / options.loading_s))
        time.sleep(0.02)
    if options.garbage:
        with write_lock:
            channel.sendall(b"x" * 100_000 + b"\nnot json\n[1]\n\xff\xfe\n{}\n" + b'{"type":"phase","phase":7}\n')
    loaded = True
    phase("proving")
    if options.fault_if and Path(options.fault_if).exists():
        options.fault = "broken later"
    if options.fault:
        send(type="fault", reason=options.fault, hint="Look at it.")
        os._exit(1)
    last_activity = time.monotonic()
    send(type="ready", took_s=round(time.monotonic() - began, 2))
    beat()
    if options.die_after is not None:
        threading.Timer(options.die_after, os._exit, [3]).start()
    if options.die == "ready":
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_activation() -> None:
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    while True:
        if not selector.select(0.2):
            if options.die_waiting:
                os._exit(3)
            beat()
        elif next_message() == "activate":
            return


def next_message() -> str:
    """The type of the next line of the channel, and no byte more; the channel's end is the end of this process."""
    line = b""
    while not line.endswith(b"\n"):
        byte = channel.recv(1)
        if not byte:
            os._exit(0)
        line += byte
    kind = str(json.loads(line)["type"])
    print("received", kind, flush=True)
    if kind == "stop" and not options.ignore_sigterm:
        os._exit(0)
    return kind


def count(change: int) -> None:
    global in_flight, last_activity
    with count_lock:
        in_flight += change
        last_activity = time.monotonic()


def answer(client: socket.socket) -> None:
    global served
    client.setblocking(True)
    client.settimeout(5)
    beat()
    try:
        request = client.recv(65536).decode("latin-1")
        path, _, amount = request.split(" ")[1].partition("?") if request else ("/", "", "")
        act(path, int(amount or 0))
        served += 1
        body = str(os.getpid()).encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    except OSError:
        pass
    finally:
        client.close()
        count(-1)
        beat()
        if draining and not in_flight:
            os._exit(0)


def act(path: str, amount: int) -> None:
    global processed, rss, mute
    if path == "/die":
        os._exit(3)
    if path == "/exit0":
        os._exit(0)
    if path in ("/kill", "/freeze"):
        os.kill(os.getpid(), signal.SIGKILL if path == "/kill" else signal.SIGSTOP)
    if path == "/fault":
        send(type="fault", reason="too late", hint="")
        os._exit(1)
    if path == "/slow":
        time.sleep(1)
    if path == "/hang":
        time.sleep(1000)
    if path == "/rss":
        rss = amount
    if path == "/busy":
        for _ in range(amount):
            processed += 1
            time.sleep(0.1)
    if path == "/spin":
        mute, end = True, time.monotonic() + amount / 10
        while time.monotonic() < end:
            pass
        mute = False
    if path == "/line":
        written = 0
        while written < amount:
            written += os.write(1, b"\xff\x00" * 30_000)
    if path == "/flood":
        line = b"flood " * 20 + b"\n"
        for _ in range(amount // (len(line) * 500) + 1):
            os.write(1, line * 500)


def on_channel(selector: selectors.BaseSelector) -> None:
    global draining
    if next_message() == "drain":
        draining = True
        for listener in listeners:
            selector.unregister(listener)
            listener.close()
        if not in_flight:
            os._exit(0)


def serve() -> None:
    selector = selectors.DefaultSelector()
    for listener in listeners:
        selector.register(listener, selectors.EVENT_READ)
    if not options.ignore_channel:
        selector.register(channel, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select(0.5):
            if key.fileobj is channel:
                on_channel(selector)
                continue
            try:
                client, _ = key.fileobj.accept()  # type: ignore[union-attr]
            except (BlockingIOError, OSError):
                continue
            count(1)  # before anything can end this process for having nothing to do
            threading.Thread(target=answer, args=(client,), daemon=True).start()
        if options.ignore_channel:
            continue
        beat()


start_up()
serve()
