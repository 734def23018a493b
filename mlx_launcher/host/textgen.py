"""The real mlx-textgen behind the engine: its model, tokenizer, inference plans, sampler and KV cache on disk.

Its server and its tool-call state machine are not used: they run MLX on several threads, answer 500 to valid requests, and
never fire streamed tool calls. What stands in this package instead is the layer above `LLMModel`.
"""

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from mlx_lm.generate import wired_limit
from mlx_lm.models import cache as caches
from pydantic import ValidationError

from mlx_launcher.host import chat, corrections, events
from mlx_launcher.host.channels import CALL_START
from mlx_launcher.host.corrections import DEFAULT_TOOL_SYSTEM, GENERATION_STREAM, Sampler, SamplingParams
from mlx_launcher.host.decoding import Sequence
from mlx_launcher.host.engine import Counters, where
from mlx_launcher.host.errors import EmptyPromptError, ModelFault, RequestError
from mlx_launcher.host.guided import Guides, guide_grammar, tool_call_grammar
from mlx_launcher.host.kvfiles import State
from mlx_launcher.host.kvstate import KVStates
from mlx_launcher.host.prefill import Prefill
from mlx_launcher.host.reading import reader_for
from mlx_launcher.host.requests import Generation, check_logit_bias
from mlx_launcher.host.settings import Settings
from mlx_launcher.host.styles import Style, detect
from mlx_launcher.host.warmup import Warmup
from mlx_launcher.host.weights import read_weights
from mlx_launcher.kvcache.store import Limits, default_max_bytes, open_store
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.models.facts import context_length, facts, vocabulary_size, why_not_textgen
from mlx_launcher.models.fingerprint import fingerprint

log = logging.getLogger("mlx_launcher.host")

TRY_LEGACY = "Serve it with --mode=mlx-legacy."

# Of the machine's memory, for the states that stay in it.
MEMORY_SHARE = 8

# mlx-textgen's own default where a client names no limit.
DEFAULT_MAX_TOKENS = 4096


class Textgen:
    """A Runtime (see engine.py) over mlx-textgen's `LLMModel`."""

    def __init__(self) -> None:
        self._model: Any = None
        self._guides: Guides
        self._style: Style | None
        self._states: KVStates
        self._warmup: Warmup
        self._prefill: Prefill
        self._context: int | None = None
        self._eos: set[int] = set()

    def load(self, settings: Settings, progress: Callable[[int, int], object]) -> None:
        path = Path(settings["model_path"])
        try:
            total = check(path)
        except BrokenModelError as error:
            raise ModelFault(error.reason, error.hint) from None
        progress(0, total)
        corrections.without_cache_manager()
        corrections.name_logit_bias_right()
        try:
            self._model = corrections.TextModel(str(path), model_name=settings["model_id"], verbose=False)
        except ValueError as error:
            # Looking into mlx-lm's sources takes a tenth of a second: only to name the cause.
            if (reason := why_not_textgen(facts(path))) is not None:
                raise ModelFault(reason, TRY_LEGACY) from error
            raise ModelFault(f"{path} cannot be loaded: {error}") from error
        if own := sorted(_states_of_its_own(self._model.get_empty_cache())):
            what = f"{path} keeps its state in {', '.join(own)}, which mlx-textgen cannot serve"
            raise ModelFault(what, TRY_LEGACY)
        read_weights(self._model.model, total, progress)
        self._states = _states(self._model.get_empty_cache, settings)
        self._warmup = Warmup(settings["warmup"] if settings["cache"]["enabled"] else [])
        self._prefill = Prefill(self._model, settings["prefill_batch"])
        self._guides = Guides(self._model.tokenizer)
        self._style = detect(self._model.tokenizer)
        self._context = context_length(self._model.config)
        eos = self._model.config.get("eos_token_id")
        self._eos = {token for token in ([*eos] if isinstance(eos, list) else [eos]) if token is not None}
        if self._model.tokenizer.eos_token_id is not None:
            self._eos.add(self._model.tokenizer.eos_token_id)

    def kv_cache(self) -> dict[str, Any] | None:
        return self._states.summary()

    def notes(self) -> list[str]:
        return self._warmup.notes()

    def rest(self, wanted: threading.Event) -> float | None:
        self._states.evict()
        if wanted.is_set():
            return 0.0
        again = self._states.save()
        if again == 0.0 or (request := self._warmup.next()) is None:
            return again
        self._warm(request, wanted)
        return 0.0

    def flush(self) -> None:
        self._states.flush()

    def generate(self, request: Generation, cancelled: threading.Event, counters: Counters) -> Iterator[events.Event]:
        prompts = self._prompts(request)
        for index, prompt in enumerate(text for text in prompts for _ in range(request.n)):
            if cancelled.is_set():
                return
            yield from self._answer(index, prompt, request, cancelled, counters)

    def _prompts(self, request: Generation) -> list[str]:
        if request.messages is None:
            return request.prompts
        description = None if self._style is None or self._style.in_template else DEFAULT_TOOL_SYSTEM
        prompt = chat.render(self._model.tokenizer, request.messages, request.tools, description=description)
        return [prompt + self._opening(request)]

    def _opening(self, request: Generation) -> str:
        """What the prompt begins of a call that has to be made."""
        if not request.must_call:
            return ""
        if self._style is None:
            return CALL_START
        return "" if self._style.bare else self._style.start

    def _sequence(self, request: Generation, state: State, token_ids: mx.array, sampler: Sampler) -> Sequence:
        style = self._style
        reader = reader_for(
            style,
            request.tools or [],
            may_call=bool(request.callable_tools),
            must_call=request.must_call,
            single=request.single_call,
            opened=self._opening(request),
        )
        grammar = functools.partial(
            tool_call_grammar, request.callable_tools, (style and style.arguments_key) or "arguments"
        )
        return Sequence(
            self._model,
            state,
            token_ids,
            sampler,
            reader,
            lambda: self._guides.matcher(grammar()),
            request.stop,
            self._eos,
            request.top_logprobs,
        )

    def _answer(
        self, index: int, prompt: str, request: Generation, cancelled: threading.Event, counters: Counters
    ) -> Iterator[events.Event]:
        check_logit_bias(request, vocabulary_size(self._model.config) or len(self._model.tokenizer))
        try:
            params = SamplingParams(
                **{**request.sampling, "seed": _seed(request, index)},
                logprobs=request.top_logprobs is not None,
                top_logprobs=request.top_logprobs or 1,
            )
        except ValidationError as error:
            raise RequestError(400, str(error.errors(include_url=False)[0]["msg"])) from None
        sampler = Sampler(params)
        if request.guide:
            sampler.structured_processor = self._guides.matcher(guide_grammar(request.guide))

        token_ids = self._model.prepare_inputs(prompt)["input_ids"]
        tokens: list[int] = token_ids[0].tolist()
        max_tokens = self._fit(len(tokens), request.max_tokens)
        state, cached = self._states.restore(tokens)
        counters.prompted(len(tokens), cached)
        yield events.Started(index, len(tokens), cached)
        with wired_limit(self._model.model, [GENERATION_STREAM]):
            run = self._prefill.run(token_ids, state, cached, cancelled, counters)
            if run.logits is None:
                self._states.keep(state, tokens[: run.held])
                return
            sequence = self._sequence(request, state, token_ids, sampler)
            yield from sequence.run(index, run.logits, max_tokens, cancelled, counters)
        if run.copy is not None:
            self._states.keep(run.copy, tokens[:-1])
        else:
            self._states.keep(state, sequence.held_tokens())

    def _warm(self, request: Generation, wanted: threading.Event) -> None:
        """Brings a prompt into the cache, as far as it gets before somebody asks for the thread. One that fails is not tried
        again: it would fail whenever nobody asks.
        """
        try:
            self._warm_up(request, wanted)
        except RequestError as error:
            self._warmup.skip(error.message)
        except Exception as error:
            self._warmup.skip(where(error))

    def _warm_up(self, request: Generation, wanted: threading.Event) -> None:
        token_ids = self._model.prepare_inputs(self._prompts(request)[0])["input_ids"]
        tokens: list[int] = token_ids[0].tolist()
        self._fit(len(tokens), 1)
        state, cached = self._states.restore(tokens)
        if cached == len(tokens) - 1:
            self._states.keep(state, tokens[:cached])
            self._warmup.done()
            return
        with wired_limit(self._model.model, [GENERATION_STREAM]):
            run = self._prefill.run(token_ids, state, cached, wanted, Counters())
        if run.copy is not None:
            self._states.keep(run.copy, tokens[:-1])
        else:
            self._states.keep(state, tokens[: run.held])
        if run.logits is not None:
            self._warmup.done()

    def _fit(self, prompt_tokens: int, wanted: int | None) -> int:
        if not prompt_tokens:
            raise EmptyPromptError
        if self._context is None:
            return wanted or DEFAULT_MAX_TOKENS
        if prompt_tokens >= self._context:
            raise RequestError(
                400,
                f"the prompt has {prompt_tokens} tokens, the model's context is {self._context}",
                param="messages",
                code="context_length_exceeded",
            )
        return min(wanted or DEFAULT_MAX_TOKENS, self._context - prompt_tokens)


def _seed(request: Generation, index: int) -> int:
    """MLX has one generator of random numbers: after a seeded answer all others would repeat, too, were they not given seeds. And
    several answers to one prompt are to be several.
    """
    seed = request.sampling.get("seed")
    return secrets.randbits(64) if seed is None else (int(seed) + index % request.n) % 2**64


def _states_of_its_own(layers: Iterable[Any]) -> Iterator[str]:
    """The classes in which layers keep what they have read, where those are not mlx-lm's common ones: only these go on disk."""
    for layer in layers:
        if type(layer).__module__ != caches.__name__:
            yield type(layer).__name__
        yield from _states_of_its_own(getattr(layer, "caches", ()))


def _states(make_empty: Callable[[], State], settings: Settings) -> KVStates:
    """The KV cache as it is set: a place that cannot be used costs what is kept there, and nothing else."""
    cache, path = settings["cache"], Path(settings["model_path"])
    if not cache["enabled"]:
        return KVStates(make_empty, None, 0, cache["min_tokens"])
    memory_bytes = cache["memory_bytes"]
    if memory_bytes is None:
        memory_bytes = psutil.virtual_memory().total // MEMORY_SHARE
    root = Path(cache["dir"])
    store, problem = None, None
    try:
        bound = cache["max_bytes"]
        limits = Limits(cache["slots"], cache["min_tokens"], default_max_bytes(root) if bound is None else bound)
        store = open_store(root, fingerprint(path), limits)
        store.describe(settings["model_id"], path)
    except OSError as error:
        problem = f"the KV cache is not saved: {root}: {error.strerror or error}"
        log.warning("%s", problem)
    return KVStates(make_empty, store, memory_bytes, cache["min_tokens"], problem)
