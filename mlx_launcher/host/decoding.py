"""One answer while it is decoded: sampling, stop strings, and the switch into a constrained tool call."""

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_launcher.host import events
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.guided import Guides, Matcher, tool_call_grammar
from mlx_launcher.host.requests import Generation
from mlx_launcher.host.stops import StopScanner


class Sequence:
    """One answer while it is decoded."""

    def __init__(
        self,
        model: Any,
        guides: Guides,
        state: list[Any],
        token_ids: mx.array,
        sampler: Any,
        request: Generation,
        eos: set[int],
    ) -> None:
        self._model = model
        self._guides = guides
        self._state = state
        self._sampler = sampler
        self._request = request
        self._eos = eos
        self._start = token_ids.shape[1]
        self._detokenizer = model.detokenizer_class(tokenizer=model.tokenizer)
        self._may_call = bool(request.callable_tools) and not request.must_call
        stops = [*request.stop, *([model.chat_template.tool_start] if self._may_call else [])]
        self._scanner = StopScanner(stops)
        self._call: str | None = "" if request.must_call else None
        self._taken = False
        self._token_ids = token_ids
        self._run = token_ids.shape[1]

    def run(
        self, index: int, logits: mx.array, max_tokens: int, cancelled: threading.Event, counters: Counters
    ) -> Iterator[events.Event]:
        """Yields text as it comes, a call when it is whole, and Ended, unless the client left."""
        reason, produced = "length", 0
        while produced < max_tokens:
            if cancelled.is_set():
                return
            sampled, logprobs = self._sampler.sample(logits, self._token_ids, self._start)
            token = int(sampled.item())
            self._token_ids = mx.concatenate([self._token_ids, sampled.astype(self._token_ids.dtype)], axis=1)
            produced += 1
            counters.completion_tokens += 1
            if token in self._eos:
                reason = "stop"
                break
            if self._matcher is not None:
                self._matcher.consume([token])
            text, stop = self._take(token)
            if text or self._request.top_logprobs is not None:
                yield events.Text(index, text, self._logprobs(logprobs, sampled, text))
            if stop is not None or (self._matcher is not None and self._matcher.finished):
                reason = "stop"
                break
            logits = self._model._inference(sampled, cache=self._state, mask=None)
            self._run += 1
        yield from self._end(index, reason, produced)

    def held_tokens(self) -> list[int]:
        """The tokens that the state holds: all but those that were sampled and not run."""
        return list(self._token_ids[0, : self._run].tolist())  # type: ignore[arg-type]

    def _take(self, token: int) -> tuple[str, str | None]:
        """Adds a token; returns the text to show and the stop string that ended the answer, if one did."""
        self._taken = True
        self._detokenizer.add_tokens([[token]])
        return self._take_text(self._detokenizer.last_segments[0])

    def _take_text(self, piece: str) -> tuple[str, str | None]:
        if self._call is not None:
            self._call += piece
            return "", None
        text, stop, rest = self._scanner.feed(piece)
        if self._may_call and stop == self._model.chat_template.tool_start:
            matcher = self._guides.matcher(tool_call_grammar(self._request.callable_tools))
            # The token that ended the marker may hold the beginning of the call.
            if matcher.consume(self._model.tokenizer.encode(rest, add_special_tokens=False) if rest else []):
                self._sampler.structured_processor = matcher
                self._call = rest
                return text, None
            return f"{text}{stop}{rest}", None
        return text, stop

    @property
    def _matcher(self) -> Matcher | None:
        matcher: Matcher | None = self._sampler.structured_processor
        return matcher

    def _logprobs(self, logprobs: mx.array, sampled: mx.array, text: str) -> dict[str, Any] | None:
        top = self._request.top_logprobs
        if top is None:
            return None
        rows = self._model._get_logprobs(logprobs, sampled, [text], max(top, 1), self._sampler.row_range)
        return {**rows[0], "top_logprobs": rows[0]["top_logprobs"][:top]}

    def _end(self, index: int, reason: str, produced: int) -> Iterator[events.Event]:
        text = ""
        if self._taken:
            self._detokenizer.finalize()
            text, _ = self._take_text(self._detokenizer.last_segments[0])
        if rest := text + self._scanner.flush():
            yield events.Text(index, rest, None)
        if self._call is not None and reason == "stop":
            call = json.loads(self._call)
            yield events.Call(index, f"call_{uuid.uuid4().hex[:24]}", call["name"], json.dumps(call["arguments"]))
            reason = "tool_calls"
        yield events.Ended(index, reason, produced)
