"""One answer while it is decoded: sampling, the grammar that may constrain it, and the reader that makes events of text."""

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_launcher.host import events
from mlx_launcher.host.channels import Piece
from mlx_launcher.host.corrections import GENERATION_STREAM
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.guided import Matcher
from mlx_launcher.host.reading import Reader
from mlx_launcher.host.stops import StopScanner

# mlx-lm's own interval: the buffers that decoding leaves are given back this often.
CLEAR_EVERY = 256


class _Sampled(NamedTuple):
    """A token, on its way; `logits` are what it was sampled from, and `logprobs` None where nobody asked for them."""

    logits: mx.array
    token: mx.array
    logprobs: mx.array | None


class Sequence:
    """Decodes one answer. `call_matcher` makes a matcher for a tool call, where the reader asks for one.

    The model is always one token ahead: while it runs on a token, that token is read and told. What is sampled ahead is
    sampled again where the reader then asks for a grammar; the model has not been run on it yet, so nothing is lost.
    """

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
        self._prompt = token_ids
        self._seen = token_ids  # grows only for a sampler that looks back
        self._written: list[int] = []
        self._run = 0  # how many of the written tokens the state holds
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
        reason = "length"
        step: _Sampled | None = self._sample(logits)
        while step is not None:
            if cancelled.is_set():
                return
            ahead, following = self._ahead(step) if len(self._written) + 1 < max_tokens else (None, None)
            token = int(step.token.item())  # type: ignore[arg-type]
            self._written.append(token)
            counters.decoded()
            if token in self._eos:
                reason = "stop"
                break
            text = self._read(token)
            if ahead is not None and (following is None or self._matcher is not None):
                following = self._sample(ahead)
            yield from self._told(index, text, self._logprobs(step, text))
            if self._stopped or self._guided or self._reader.finished:
                reason = "stop"
                break
            step = following
        yield from self._end(index, reason, len(self._written))

    def held_tokens(self) -> list[int]:
        """The tokens that the state holds: all but one that was sampled and not run."""
        return [*self._prompt[0].tolist(), *self._written[: self._run]]  # type: ignore[misc]

    def _ahead(self, step: _Sampled) -> tuple[mx.array, _Sampled | None]:
        """Has the model begin on a token, and samples the next one, unless a grammar has to read this one first."""
        if self._sampler.looks_back:
            self._seen = mx.concatenate([self._seen, step.token.astype(self._seen.dtype)], axis=1)
        logits = self._model._inference(step.token, cache=self._state, mask=None)
        self._run += 1
        if self._run % CLEAR_EVERY == 0:
            mx.clear_cache()
        if self._matcher is None:
            return logits, self._sample(logits)
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        return logits, None

    def _sample(self, logits: mx.array) -> _Sampled:
        # On the model's stream: between two streams each token would wait for the other one to notice.
        with mx.stream(GENERATION_STREAM):
            token, logprobs = self._sampler.sample(logits, self._seen, self._prompt.shape[1])
        if self._top_logprobs is None:
            mx.async_eval(token)  # type: ignore[no-untyped-call]
            return _Sampled(logits, token, None)
        mx.async_eval(token, logprobs)  # type: ignore[no-untyped-call]
        return _Sampled(logits, token, logprobs)

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

    def _logprobs(self, step: _Sampled, pieces: list[Piece]) -> dict[str, Any] | None:
        top = self._top_logprobs
        if top is None:
            return None
        text = "".join(value for kind, value in pieces if kind == "content")
        rows = self._model._get_logprobs(step.logprobs, step.token, [text], max(top, 1), self._sampler.row_range)
        return {**rows[0], "top_logprobs": rows[0]["top_logprobs"][:top]}

    def _end(self, index: int, reason: str, produced: int) -> Iterator[events.Event]:
        pieces: list[Piece] = []
        over = self._stopped or self._guided or self._reader.finished
        if not over and self._decoded:
            self._detokenizer.finalize()
            segments = self._detokenizer.last_segments
            pieces = self._reader.feed(segments[0]) if segments else []
        if not over and (reason == "stop" or not self._reader.in_call):
            pieces += self._reader.finish()
        yield from self._told(index, pieces, None)
        if not self._stopped and (rest := self._stops.flush()):
            yield events.Text(index, rest, None)
        if self._calls and not (reason == "length" and self._reader.in_call):
            reason = "tool_calls"
        yield events.Ended(index, reason, produced)
