"""OpenAI's response bodies, built from events; streamed and whole ones tell the same story."""

import json
import time
import uuid
from typing import Any

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.events import Call, Ended, Event, Started, Text

Body = dict[str, Any]

# Stands for a text that is not known yet; no model's name is this.
_TEXT = "\0"

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError) -> Body:
    """OpenAI's error object."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def sse(body: Body | str) -> bytes:
    """One server-sent event, with the blank line that ends it."""
    return b"data: " + (body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))).encode() + b"\n\n"


class Usage:
    """Adds up what a request cost. A prompt counts once, however many answers it gets."""

    def __init__(self, answers_per_prompt: int) -> None:
        self._answers = answers_per_prompt
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0

    def add(self, event: Event) -> None:
        if isinstance(event, Started) and event.index % self._answers == 0:
            self.prompt_tokens += event.prompt_tokens
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, Ended):
            self.completion_tokens += event.completion_tokens

    def body(self) -> Body:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """Builds one response, whole or streamed, for `/v1/chat/completions` (`chat`) or `/v1/completions`."""

    def __init__(self, model: str, *, chat: bool, answers_per_prompt: int = 1) -> None:
        self._chat = chat
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self._choices: dict[int, Body] = {}
        self._calls: dict[int, int] = {}
        self._frames: dict[tuple[int, bool], tuple[bytes, bytes]] = {}
        self.usage = Usage(answers_per_prompt)

    def add(self, event: Event) -> None:
        """Takes the next event into the whole answer."""
        self.usage.add(event)
        choice = self._choices.setdefault(
            event.index, {"text": "", "thought": "", "calls": [], "logprobs": [], "reason": None}
        )
        if isinstance(event, Text):
            choice["thought" if event.reasoning else "text"] += event.text
            if event.logprobs is not None:
                choice["logprobs"].append(event.logprobs)
        elif isinstance(event, Call):
            choice["calls"].append(_call(event))
        elif isinstance(event, Ended):
            choice["reason"] = event.reason

    def whole(self) -> Body:
        """The answer that is not streamed."""
        choices = [self._whole_choice(index, self._choices[index]) for index in sorted(self._choices)]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": self.usage.body()}

    def streamed(self, event: Event) -> bytes:
        """The stream's events for one of ours, as they are sent."""
        if not isinstance(event, Text) or event.logprobs is not None or (event.reasoning and not self._chat):
            return b"".join(map(sse, self.chunks(event)))
        key = (event.index, event.reasoning)
        if (frame := self._frames.get(key)) is None:
            frame = self._frames[key] = self._frame(event.index, event.reasoning)
        return frame[0] + json.dumps(event.text).encode() + frame[1]

    def _frame(self, index: int, reasoning: bool) -> tuple[bytes, bytes]:
        """What stands before and behind the text of a chunk: the same for every token."""
        (chunk,) = self.chunks(Text(index, _TEXT, None, reasoning))
        before, behind = sse(chunk).split(json.dumps(_TEXT).encode())
        return before, behind

    def chunks(self, event: Event) -> list[Body]:
        """The stream's events for one of ours."""
        self.usage.add(event)
        if isinstance(event, Started):
            # No empty content: clients would take it for the beginning of a text where a call follows.
            return [self._chunk(event.index, {"role": "assistant"})] if self._chat else []
        if isinstance(event, Text):
            if event.reasoning:
                return [self._chunk(event.index, {"reasoning_content": event.text})] if self._chat else []
            delta = {"content": event.text} if self._chat else {"text": event.text}
            return [self._chunk(event.index, delta, [event.logprobs] if event.logprobs is not None else [])]
        if isinstance(event, Call):
            position = self._calls.get(event.index, 0)
            self._calls[event.index] = position + 1
            return [self._chunk(event.index, {"tool_calls": [{"index": position, **_call(event)}]})]
        return [self._chunk(event.index, {} if self._chat else {"text": ""}, reason=event.reason)]

    def usage_chunk(self) -> Body:
        """The last event of a stream that asked for `stream_options.include_usage`."""
        return {**self._chunk_base(), "choices": [], "usage": self.usage.body()}

    def _chunk_base(self) -> Body:
        return {**self._base, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _chunk(self, index: int, delta: Body, logprobs: list[Body] | None = None, reason: str | None = None) -> Body:
        told = {"delta": delta} if self._chat else delta
        choice = {"index": index, **told, "logprobs": self._logprobs(logprobs or []), "finish_reason": reason}
        return {**self._chunk_base(), "choices": [choice]}

    def _whole_choice(self, index: int, choice: Body) -> Body:
        rest = {"logprobs": self._logprobs(choice["logprobs"]), "finish_reason": choice["reason"]}
        if not self._chat:
            return {"index": index, "text": choice["text"], **rest}
        message: Body = {"role": "assistant", "content": choice["text"] or None}
        if choice["thought"]:
            message["reasoning_content"] = choice["thought"]
        if choice["calls"]:
            message["tool_calls"] = choice["calls"]
        elif message["content"] is None:
            message["content"] = ""
        return {"index": index, "message": message, **rest}

    def _logprobs(self, tokens: list[Body]) -> Body | None:
        if not tokens:
            return None
        if self._chat:
            return {"content": [{**token, "bytes": None} for token in tokens]}
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        }


def _call(event: Call) -> Body:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": event.arguments}}
