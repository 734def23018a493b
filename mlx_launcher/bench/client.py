"""One streamed chat request, and when each part of its answer came."""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mlx_launcher.errors import LaunchError

Message = dict[str, str]
# A server that writes faster than it sends puts several tokens into one event, and several events into one write: the first may
# hold any number of them. Ours lets 10 ms go by between writes.
_PIECES = 8
_SPAN_S = 0.1
_LOOK = "Its log tells more, start it and see"


class Address(NamedTuple):
    """Where a server listens, and what it wants to be asked for."""

    host: str
    port: int
    model: str
    api_key: str | None = None


class Answer(NamedTuple):
    """Seconds count from the moment the request is sent. Tokens are what the server's own usage says, None where it is silent.

    `first_s` is when the first text came and `last_s` when the last did; of an answer without text both are `total_s`. `pieces`
    is in how many events the text came.
    """

    text: str
    first_s: float
    last_s: float
    total_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    pieces: int

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of the prompt that were not cached, a second, until the first token."""
        if self.prompt_tokens is None or self.first_s <= 0:
            return None
        return (self.prompt_tokens - (self.cached_tokens or 0)) / self.first_s

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first; None for an answer that came in too few pieces, or too fast, to tell."""
        if self.completion_tokens is None or self.pieces < _PIECES or self.last_s - self.first_s < _SPAN_S:
            return None
        return (self.completion_tokens - 1) / (self.last_s - self.first_s)


def ask(address: Address, messages: Sequence[Message], max_tokens: int) -> Answer:
    """Asks greedily and waits for the end of the stream, however long that takes: a server that hangs is its supervisor's affair.

    LaunchError `no_answer` when the connection breaks, `refused` when the answer is an error.
    """
    connection = http.client.HTTPConnection(address.host, address.port)
    try:
        return _ask(connection, address, messages, max_tokens)
    except (OSError, http.client.HTTPException) as error:
        what = f"it broke off while it answered: {error or type(error).__name__}"
        raise LaunchError("no_answer", what, _LOOK) from error
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, address: Address, messages: Sequence[Message], max_tokens: int
) -> Answer:
    body = {
        "model": address.model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json"}
    if address.api_key:
        headers["Authorization"] = f"Bearer {address.api_key}"
    text, usage = "", dict[str, Any]()
    came: list[float] = []
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise _refused(response.status, response.read())
    for event in _events(response):
        if "error" in event:
            raise _refused(response.status, json.dumps(event).encode())
        usage = event.get("usage") or usage
        delta = (event["choices"][0].get("delta") if event.get("choices") else None) or {}
        if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
            came.append(time.perf_counter() - began)
            text += delta.get("content") or ""
    total = time.perf_counter() - began
    first, last = (came[0], came[-1]) if came else (total, total)
    details = usage.get("prompt_tokens_details") or {}
    counts = (usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens"))
    return Answer(text, first, last, total, *counts, len(came))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise LaunchError("refused", "an event of its stream is not JSON", "It is no OpenAI server") from None
        if isinstance(event, dict):
            yield event
    # http.client takes a connection that is cut for the end of a stream.
    raise LaunchError("no_answer", "its answer broke off: the stream ended without [DONE]", _LOOK)


def _refused(status: int, body: bytes) -> LaunchError:
    """The server's own words, where it has any."""
    try:
        said = json.loads(body)["error"]
        why = str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        why = f"HTTP {status}"
    return LaunchError("refused", f"it does not answer a chat request: {why}")
