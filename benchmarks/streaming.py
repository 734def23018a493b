"""A client that takes a stream's bytes with the time of each arrival and reads them afterwards, so that it hardly takes part."""

import json
import socket
import time
from typing import Any, NamedTuple


class Streamed(NamedTuple):
    """One streamed answer. Seconds: from the request to the first text, and from there to the last of `tokens`.

    `after_first` counts the tokens that arrived after the first piece.
    """

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    after_first: int
    first_s: float
    rest_s: float
    text: str


def stream(port: int, prompt: str, max_tokens: int, path: str = "/v1/chat/completions", **fields: Any) -> Streamed:
    """Greedy, as one user message. A server that does not tell usage in its stream leaves 0 where it is missing."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    arrivals: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(head.encode() + raw)
        while piece := connection.recv(1 << 16):
            arrivals.append((time.perf_counter(), piece))
    return _read(arrivals, began)


def _read(arrivals: list[tuple[float, bytes]], began: float) -> Streamed:
    pieces: list[tuple[float, str]] = []
    usage: dict[str, Any] = {}
    held = b""
    for at, piece in arrivals:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            text = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if text:
                pieces.append((at, text))
    if not pieces:
        raise ConnectionError(f"no text came: {arrivals[-1][1][:200]!r}" if arrivals else "nothing came")
    first, last = pieces[0][0], pieces[-1][0]
    return Streamed(
        usage.get("prompt_tokens", 0),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        usage.get("completion_tokens", 0),
        sum(at > first for at, _ in pieces),
        first - began,
        last - first,
        "".join(text for _, text in pieces),
    )
