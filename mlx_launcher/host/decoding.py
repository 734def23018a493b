"""One answer while it is decoded: sampling, the grammar that may constrain it, and the reader that makes events of text."""

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_launcher.host import events
from mlx_launcher.host.channels import Piece
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.guided import Matcher
from mlx_launcher.host.reading import Reader
from mlx_launcher.host.stops import StopScanner


class Sequence:
    """Decodes one answer. `call_matcher` makes a matcher for a tool call, where the reader asks for one."""

    def __init__(
        self,
        model: Any,
        state: list[Any],
        token_ids: mx.array,
        sampler: Any,
        reader: Reader,
        call_matcher: Any,
        stops: list[str],
        eos: set[int],
        top_logprobs: int | None,
    ) -> None:
        self._model = model
        self._state = state
        self._token_ids = token_ids
        self._start = self._run = token_ids.shape[1]
        self._sampler = sampler
        self._reader = reader
        self._call_matcher = call_matcher
        self._stops = StopScanner(stops)
        self._eos = eos
        self._top_logprobs = top_logprobs
        self._detokenizer = model.detokenizer_class(tokenizer=model.tokenizer)
        self._decoded = False  # whether the detokenizer was given anything
        self._stopped = False  # a stop string was written
        self._guided = False  # the guided answer is whole
        self._calls = 0

    def run(
        self, index: int, logits: mx.array, max_tokens: int, cancelled: threading.Event, counters: Counters
    ) -> Iterator[events.Event]:
        """Yields text as it comes, a call when it is whole, and Ended, unless the client left."""
        self._constrain([])
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
            text = self._read(token)
            yield from self._told(index, text, self._logprobs(logprobs, sampled, text))
            if self._stopped or self._guided or self._reader.finished:
                reason = "stop"
                break
            logits = self._model._inference(sampled, cache=self._state, mask=None)
            self._run += 1
        yield from self._end(index, reason, produced)

    def held_tokens(self) -> list[int]:
        """The tokens that the state holds: all but those that were sampled and not run."""
        return list(self._token_ids[0, : self._run].tolist())  # type: ignore[arg-type]

    def _read(self, token: int) -> list[Piece]:
        matcher = self._matcher
        if matcher is not None:
            matcher.consume([token])
        self._decoded = True
        self._detokenizer.add_tokens([[token]])
        pieces: list[Piece] = self._reader.feed(self._detokenizer.last_segments[0])
        if matcher is None:
            self._constrain(pieces)
        elif matcher.finished:
            # Either a call is whole, or the guided answer.
            self._sampler.structured_processor = None
            if self._reader.in_call:
                pieces += self._reader.called()
            else:
                self._guided = True
        return pieces

    def _constrain(self, pieces: list[Piece]) -> None:
        """Puts the grammar in force that the reader asks for, from what is written of the call already."""
        begun = self._reader.constrain
        if begun is None or self._matcher is not None:
            return
        matcher: Matcher = self._call_matcher()
        if matcher.consume(self._model.tokenizer.encode(begun, add_special_tokens=False) if begun else []):
            self._sampler.structured_processor = matcher
        else:
            pieces += self._reader.not_a_call()

    @property
    def _matcher(self) -> Matcher | None:
        matcher: Matcher | None = self._sampler.structured_processor
        return matcher

    def _told(self, index: int, pieces: list[Piece], logprobs: dict[str, Any] | None) -> Iterator[events.Event]:
        if not pieces and logprobs is not None:
            pieces = [("content", "")]
        for kind, value in pieces:
            if kind == "call":
                name, arguments = value
                self._calls += 1
                yield events.Call(
                    index, f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False)
                )
            elif kind == "reasoning":
                yield events.Text(index, value, None, reasoning=True)
            elif not self._stopped:
                shown, stop, _ = self._stops.feed(value)
                self._stopped = stop is not None
                if shown or logprobs is not None:
                    yield events.Text(index, shown, logprobs)
                logprobs = None

    def _logprobs(self, logprobs: mx.array, sampled: mx.array, pieces: list[Piece]) -> dict[str, Any] | None:
        top = self._top_logprobs
        if top is None:
            return None
        text = "".join(value for kind, value in pieces if kind == "content")
        rows = self._model._get_logprobs(logprobs, sampled, [text], max(top, 1), self._sampler.row_range)
        return {**rows[0], "top_logprobs": rows[0]["top_logprobs"][:top]}

    def _end(self, index: int, reason: str, produced: int) -> Iterator[events.Event]:
        pieces: list[Piece] = []
        over = self._stopped or self._guided or self._reader.finished
        if not over and self._decoded:
            self._detokenizer.finalize()
            segments = self._detokenizer.last_segments
            pieces = self._reader.feed(segments[0]) if segments else []
        if reason == "stop" and not over:
            pieces += self._reader.finish()
        yield from self._told(index, pieces, None)
        if not self._stopped and (rest := self._stops.flush()):
            yield events.Text(index, rest, None)
        if self._calls and not (reason == "length" and self._reader.in_call):
            reason = "tool_calls"
        yield events.Ended(index, reason, produced)
