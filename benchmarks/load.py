"""Eight clients, streamed and not, mixed, against a running server, and what /health costs meanwhile.

    .venv/bin/mlx-launch start --demo && python -m benchmarks.load [--seconds 60] [--port 8081]

Prints answers, errors and the percentiles of /health's time in milliseconds.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    answers, errors, health = [0] * arguments.clients, list[str](), list[float]()

    def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            body = {
                "messages": [{"role": "user", "content": "word " * chance.choice([1, 20, 200])}],
                "max_tokens": chance.choice([1, 20, 100]),
                "stream": chance.random() < 0.5,
            }
            try:
                status, raw = request(arguments.port, "/v1/chat/completions", body)
                whole = raw.endswith(b"data: [DONE]\n\n") if body["stream"] else bool(json.loads(raw)["choices"])
                if status != 200 or not whole:
                    errors.append(f"{status} {raw[-200:]!r}")
                answers[number] += 1
            except Exception as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        began = time.perf_counter()
        request(arguments.port, "/health")
        health.append((time.perf_counter() - began) * 1000)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(health, n=100)
    sys.stdout.write(
        f"{sum(answers)} answers from {arguments.clients} clients in {arguments.seconds:g} s, {len(errors)} errors\n"
        f"/health, {len(health)} times: median {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms, worst {max(health):.1f} ms\n"
    )
    for error in errors[:5]:
        sys.stdout.write(f"  {error}\n")
    return 1 if errors else 0


def request(port: int, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        raw = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
