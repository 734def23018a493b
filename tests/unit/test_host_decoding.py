"""Decoding is one token ahead of what is read: what that must not change."""

import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_launcher.host.corrections import Detokenizer, Sampler, SamplingParams
from mlx_launcher.host.decoding import Sequence
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.events import Ended, Event
from mlx_launcher.host.prefill import LONG_BATCH_S, MAX_BATCH, QUICK_BATCH_S, SLOW_BATCH_S, Prefill
from mlx_launcher.host.reading import CallReader, TextReader
from mlx_launcher.host.styles import HERMES

VOCABULARY = 32
PROMPT = [3, 1, 4]
END = 31


class Counting:
    """Stands for model, tokenizer and detokenizer: behind each token comes the next number. `ran` is what the state holds."""

    def __init__(self) -> None:
        self.ran: list[int] = list(PROMPT)
        self.tokenizer = self

    def detokenizer_class(self, tokenizer: Any) -> "Counting":
        return self

    def add_tokens(self, tokens: list[list[int]]) -> None:
        self.last_segments = [f"{tokens[0][0]} "]

    def finalize(self) -> None:
        self.last_segments = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(text)] if text else []

    def _inference(self, tokens: mx.array, **_: Any) -> mx.array:
        token = int(tokens[0, 0].item())  # type: ignore[arg-type]
        self.ran.append(token)
        return logits_for(token + 1)


class Backwards:
    """Stands for a grammar that allows one token after the other, each the half of the one before."""

    finished = False

    def __init__(self) -> None:
        self.wanted = 16

    def __call__(self, *, input_ids: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(VOCABULARY) == self.wanted, logits, -mx.inf)

    def consume(self, tokens: list[int]) -> bool:
        if tokens:
            self.wanted //= 2
        self.finished = self.wanted == 0
        return True


class Switching(TextReader):
    """Asks for the grammar as soon as it has read 7."""

    def feed(self, text: str) -> Any:
        if text == "7 ":
            self.constrain = ""
        return super().feed(text)


def logits_for(token: int) -> mx.array:
    return (mx.arange(VOCABULARY) == token).astype(mx.float32)[None]


def sequence(model: Counting, reader: Any = None, **sampling: Any) -> Sequence:
    sampler = Sampler(SamplingParams(**sampling))
    return Sequence(model, [], mx.array([PROMPT]), sampler, reader or TextReader(), Backwards, [], {END}, None)


def told(answer: Sequence, max_tokens: int = 100, first: int = 5) -> tuple[str, Ended]:
    *texts, ended = answer.run(0, logits_for(first), max_tokens, threading.Event(), Counters())
    assert isinstance(ended, Ended)
    return "".join(getattr(event, "text", "") for event in texts), ended


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.001, "seed": 1}])
def test_the_model_is_not_run_on_the_last_token_that_is_allowed(sampling: dict[str, Any]) -> None:
    model = Counting()
    answer = sequence(model, **sampling)
    text, ended = told(answer, max_tokens=3)
    assert (text, ended.reason, ended.completion_tokens) == ("5 6 7 ", "length", 3)
    assert model.ran == [*PROMPT, 5, 6] == answer.held_tokens()


def test_a_token_that_ends_the_answer_is_held_where_the_model_was_run_on_it() -> None:
    model = Counting()
    answer = sequence(model)
    text, ended = told(answer, first=29)
    assert (text, ended.reason, ended.completion_tokens) == ("29 30 ", "stop", 3)
    assert model.ran == [*PROMPT, 29, 30, END] == answer.held_tokens()


def test_a_token_in_flight_is_sampled_again_under_the_grammar_that_the_reader_asks_for() -> None:
    model = Counting()
    answer = sequence(model, Switching())
    text, ended = told(answer)
    # 8 was in flight when 7 was read.
    assert text == "5 6 7 16 8 4 2 1 "
    assert ended.completion_tokens == 8
    assert 17 not in model.ran
    assert model.ran == answer.held_tokens()


def test_one_that_is_cancelled_stops_within_a_token_and_knows_what_the_state_holds() -> None:
    model, cancelled, counters = Counting(), threading.Event(), Counters()
    answer = sequence(model)
    events: Iterator[Event] = answer.run(0, logits_for(5), 100, cancelled, counters)
    next(events), next(events)
    cancelled.set()
    assert list(events) == []
    assert counters.completion_tokens == 2
    assert model.ran == [*PROMPT, 5, 6] == answer.held_tokens()


def test_a_penalty_sees_the_tokens_before() -> None:
    class Repeating(Counting):
        def _inference(self, tokens: mx.array, **_: Any) -> mx.array:
            super()._inference(tokens)
            return logits_for(5) + 0.9 * logits_for(6) + 0.8 * logits_for(7)

    assert told(sequence(Repeating()), max_tokens=3)[0] == "5 5 5 "
    assert told(sequence(Repeating(), presence_penalty=0.5), max_tokens=3)[0] == "5 6 7 "


def test_what_an_answer_is_cut_in_is_told_where_it_is_no_call() -> None:
    class Writing(Counting):
        def add_tokens(self, tokens: list[list[int]]) -> None:
            self.last_segments = ["a <tool"]

    text, ended = told(sequence(Writing(), CallReader(HERMES, [], begun=False, single=False)), max_tokens=1)
    assert (text, ended.reason) == ("a <tool", "length")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "top_k": 1}])
def test_log_probabilities_are_the_model_s_own(sampling: dict[str, Any]) -> None:
    logits = mx.array([[1.0, 3.0, 2.0]])
    token, known = Sampler(SamplingParams(logprobs=True, **sampling)).sample(logits, mx.array([[0]]), 1)
    assert token.item() == 1
    assert known is not None
    assert np.array(known)[0] == pytest.approx([-2.4076, -0.4076, -1.4076], abs=1e-3)


def test_text_waits_until_its_characters_are_whole() -> None:
    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    detokenizer, segments = Detokenizer(Bytes()), []
    for token in "aö€".encode():
        detokenizer.add_tokens([[token]])
        segments += detokenizer.last_segments
    assert segments == ["a", "", "ö", "", "", "€"]
    detokenizer.add_tokens([["€".encode()[0]]])
    detokenizer.finalize()
    assert detokenizer.last_segments == [""]


def test_a_batch_grows_on_a_quick_machine_and_shrinks_on_a_slow_one() -> None:
    prefill = Prefill(None, 512)

    def batches(took_s: float, count: int) -> list[int]:
        sizes = []
        for _ in range(count):
            prefill._adapt(prefill._batch, took_s)
            sizes.append(prefill._batch)
        return sizes

    assert batches(QUICK_BATCH_S / 2, 3) == [1024, MAX_BATCH, MAX_BATCH]
    assert batches(QUICK_BATCH_S * 1.1, 1) == [MAX_BATCH]
    assert batches(LONG_BATCH_S * 1.1, 3) == [1024, 512, 512]
    assert batches(SLOW_BATCH_S * 1.1, 5) == [256, 128, 64, 32, 32]
    prefill._adapt(7, QUICK_BATCH_S / 2)
    assert prefill._batch == 32, "the rest of a prompt says nothing of a batch"
