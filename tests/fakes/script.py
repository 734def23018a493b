"""A server that binds the port itself and knows nothing of us, as a user's script would be. Standard library only.

Every POST is answered with `--answer` and a completion; `GET /pid` with its pid, `GET /die` ends it with 3. After `GET /hang`
nothing is answered any more, after `GET /spin?N` for N tenths of a second in which it works, after `GET /close` it only lives on.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--host", default="127.0.0.1")
arguments.add_argument("--bind-s", type=float, default=0.0, help="wait that long before the port is bound")
arguments.add_argument("--answer", type=int, default=200, help="the status of every answer to a POST, until --answer-s")
arguments.add_argument("--answer-s", type=float, default=1e9)
arguments.add_argument("--body", help="instead of a completion")
arguments.add_argument("--health", help="what GET /health answers, until --answer-s")
arguments.add_argument("--key", help="without it in the request, 401")
arguments.add_argument("--seen", help="the body of the first POST goes to this file")
arguments.add_argument("--exit", type=int, help="exit with this instead of serving")
arguments.add_argument("--grandchild", help="leave a process that sleeps and ignores SIGTERM; its pid goes here")
options = arguments.parse_args()
began = time.monotonic()
answering = threading.Event()
answering.set()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/die":
            os._exit(3)
        if self.path == "/hang":
            answering.clear()
        if self.path.startswith("/spin?"):
            answering.clear()
            end = time.monotonic() + int(self.path.removeprefix("/spin?")) / 10
            while time.monotonic() < end:
                pass
            answering.set()
        if self.path == "/close":
            server.socket.close()
            signal.pause()
        answering.wait()
        if self.path == "/health" and options.health:
            self.answer(
                200, options.health if time.monotonic() - began < options.answer_s else '{"model_loaded": true}'
            )
        else:
            self.answer(200, str(os.getpid()))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if options.seen and not Path(options.seen).exists():
            Path(options.seen).write_text(body)
        if options.key and self.headers["Authorization"] != f"Bearer {options.key}":
            self.answer(401, "{}")
        elif options.answer != 200 and time.monotonic() - began < options.answer_s:
            self.answer(options.answer, "{}")
        else:
            self.answer(200, options.body or json.dumps({"choices": [{"message": {"content": "Hello"}}]}))

    def log_message(self, *arguments: object) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            super().log_message(*arguments)  # type: ignore[arg-type]

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())


print("fake script", os.getpid(), os.environ.get("GREETING", ""), flush=True)
if options.grandchild:
    ignore = "import signal,time; signal.signal(15, signal.SIG_IGN); print('grandchild', flush=True); time.sleep(60)"
    Path(options.grandchild).write_text(str(subprocess.Popen([sys.executable, "-S", "-c", ignore]).pid))
if options.exit is not None:
    sys.exit(options.exit)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
time.sleep(options.bind_s)
if ":" in options.host:
    ThreadingHTTPServer.address_family = socket.AF_INET6
server = ThreadingHTTPServer((options.host, options.port), Handler)
server.serve_forever()
