"""What the HTTP side costs: /v1/models against a bare app under the same uvicorn, and /health while an answer is streamed.

python -m benchmarks.http [--json]
"""

import http.client
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.row import Row, at_most, interleaved, of_medians, show, spread, within
from benchmarks.streaming import stream
from benchmarks.upstream import NAME, Upstream
from mlx_launcher.demo import build_random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hosts import Host
from support.waiting import free_port, until

ROUNDS = 40
REQUESTS = 200
TOKENS = 1500
PROMPT = "Tell me of the sea, and of those who cross it."
PROBE_EVERY_S = 0.01
HEALTH_GOAL_MS = 20.0

# A constant answer of the size of ours, under the settings of mlx_launcher/host/server.py.
BARE = """
import asyncio, json, sys, uvicorn
BODY = json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "created": 1750000000, "owned_by": "x" * 10}]})
async def app(scope, receive, send):
    raw = BODY.encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": raw})
options = dict(http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
               proxy_headers=False, timeout_keep_alive=75)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), **options)
"""


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = build_random(place / "random")
        with Host(model, free_port(), place / "kvcache", cache={"enabled": False}) as host:
            models = _models(host.port)
            ours = _probes(host.port, "/health", "m")
        port = free_port()
        with Upstream(model, port, place / "home"):
            until(lambda: _answers(port), 120, "an answer of mlx_textgen")
            stream(port, PROMPT, 2, model=NAME)  # it loads the model at the first request
            theirs = _probes(port, "/v1/models", NAME)
    return [models, _health(ours, theirs)]


def _models(port: int) -> Row:
    bare_port = free_port()
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(bare_port)], stdout=subprocess.DEVNULL)
    try:
        until(lambda: _answers(bare_port), 30, "the bare app")
        _request_s(port), _request_s(bare_port)
        a, b = interleaved(ROUNDS, lambda _: _request_s(port), lambda _: _request_s(bare_port))
    finally:
        bare.terminate()
        bare.wait(30)
    detail = (
        f"{statistics.median(a) * 1e6:,.0f} µs ({spread(a)}) against {statistics.median(b) * 1e6:,.0f} µs ({spread(b)}), "
        f"{ROUNDS} rounds of {REQUESTS} requests on one connection, the median of each"
    )
    why = (
        "who asks is looked at (Host, Origin, key) and the path is found, about 5 µs of Python a request; the rest is a larger "
        "process: caches, a collector with more to walk through, a beat each second"
    )
    return at_most(
        "one request, no tokens (/v1/models)",
        "the same uvicorn, a constant answer",
        1.02,
        of_medians(a, b),
        detail,
        why,
    )


def _request_s(port: int) -> float:
    """The median of REQUESTS requests, one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    took = [_probe_s(connection, "/v1/models") for _ in range(REQUESTS)]
    connection.close()
    return statistics.median(took)


def _probe_s(connection: http.client.HTTPConnection, path: str) -> float:
    began = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    return time.perf_counter() - began


def _answers(port: int) -> bool:
    try:
        return _probe_s(http.client.HTTPConnection("127.0.0.1", port, timeout=5), "/v1/models") > 0
    except OSError:
        return False


def _probes(port: int, path: str, model: str) -> list[float]:
    """What probes took that were sent while an answer of TOKENS tokens was streamed."""
    streaming = threading.Thread(target=stream, args=(port, PROMPT, TOKENS), kwargs={"model": model})
    took = []
    streaming.start()
    while streaming.is_alive():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        took.append(_probe_s(connection, path))
        connection.close()
        time.sleep(PROBE_EVERY_S)
    streaming.join()
    return took


def _health(ours: list[float], theirs: list[float]) -> Row:
    p99 = statistics.quantiles(ours, n=100, method="inclusive")[98]
    detail = (
        f"p99 {p99 * 1000:.1f} ms of {len(ours)} probes (median {statistics.median(ours) * 1000:.1f} ms) against "
        f"{max(theirs):.1f} s at most of {len(theirs)}, while {TOKENS} tokens were streamed, llama of 11 MB (float32)"
    )
    against = "mlx_textgen serve, /v1/models"
    return within("/health p99 while streaming", against, HEALTH_GOAL_MS, "ms", p99 * 1000, p99 / max(theirs), detail)


if __name__ == "__main__":
    show(measure())
