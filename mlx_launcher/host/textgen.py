"""The real mlx-textgen behind the engine: its model, tokenizer, inference plans, sampler and KV cache on disk.

Its server and its tool-call state machine are not used: they run MLX on several threads, answer 500 to valid requests, and
never fire streamed tool calls. What stands in this package instead is the layer above `LLMModel`.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import KVCache
from mlx_textgen import model_utils
from mlx_textgen.sampling_utils import Sampler, SamplingParams
from pydantic import ValidationError

from mlx_launcher.host import chat, corrections, events
from mlx_launcher.host.decoding import Sequence
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.errors import ModelFault, RequestError
from mlx_launcher.host.guided import Guides, guide_grammar, tool_call_grammar
from mlx_launcher.host.requests import Generation
from mlx_launcher.host.settings import Settings
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.models.fingerprint import fingerprint

log = logging.getLogger("mlx_launcher.host")

# mlx-textgen's own default where a client names no limit.
DEFAULT_MAX_TOKENS = 4096


class Textgen:
    """A Runtime (see engine.py) over mlx-textgen's `LLMModel`."""

    def __init__(self) -> None:
        self._model: Any = None
        self._guides: Guides
        self._context: int | None = None
        self._eos: set[int] = set()

    def load(self, settings: Settings, progress: Callable[[int, int], object]) -> None:
        path = Path(settings["model_path"])
        try:
            total = check(path)
        except BrokenModelError as error:
            raise ModelFault(error.reason, error.hint) from None
        progress(0, total)
        cache = settings["cache"]
        corrections.keep_prompt_cache_in(Path(cache["dir"]) / fingerprint(path))
        try:
            self._model = corrections.LazyTextModel(
                model_id_or_path=str(path),
                model_name=settings["model_id"],
                verbose=False,
                enable_cache=cache["enabled"],
                preprocess_batch_size=settings["prefill_batch"],
                cache_manage_config={
                    "min_tokens": cache["min_tokens"],
                    "max_reprocess_tokens": max(250, cache["min_tokens"]),
                    "max_capacity": cache["slots"],
                },
            )
        except ValueError as error:
            raise ModelFault(f"{path} cannot be loaded: {error}") from error
        self._refuse_what_cannot_be_served(str(self._model.config.get("model_type")))
        _read_weights(self._model.model, total, progress)
        self._guides = Guides(self._model.tokenizer)
        self._context = self._model.config.get("max_position_embeddings")
        eos = self._model.config.get("eos_token_id")
        self._eos = {token for token in ([*eos] if isinstance(eos, list) else [eos]) if token is not None}
        if self._model.tokenizer.eos_token_id is not None:
            self._eos.add(self._model.tokenizer.eos_token_id)

    def kv_cache(self) -> dict[str, Any]:
        return dict(self._model.cache_manager.summary()) if self._model is not None else {}

    def generate(self, request: Generation, cancelled: threading.Event, counters: Counters) -> Iterator[events.Event]:
        prompts = self._prompts(request)
        for index, prompt in enumerate(text for text in prompts for _ in range(request.n)):
            if cancelled.is_set():
                return
            yield from self._answer(index, prompt, request, cancelled, counters)

    def _refuse_what_cannot_be_served(self, architecture: str) -> None:
        kinds = {type(layer).__name__ for layer in self._model.get_empty_cache() if type(layer) is not KVCache}
        if kinds:
            raise ModelFault(
                f"the architecture {architecture} keeps its state in {', '.join(sorted(kinds))}, which mlx-textgen cannot serve",
                "Serve this model with mlx_lm.server, or choose one with plain attention (llama, qwen2, qwen3, qwen3_moe).",
            )

    def _prompts(self, request: Generation) -> list[str]:
        if request.messages is None:
            return request.prompts
        prompt = chat.render(self._model.tokenizer, request.messages, request.tools)
        return [prompt + self._model.chat_template.tool_start if request.must_call else prompt]

    def _answer(
        self, index: int, prompt: str, request: Generation, cancelled: threading.Event, counters: Counters
    ) -> Iterator[events.Event]:
        try:
            params = SamplingParams(
                **request.sampling, logprobs=request.top_logprobs is not None, top_logprobs=request.top_logprobs or 1
            )
        except ValidationError as error:
            raise RequestError(400, str(error.errors(include_url=False)[0]["msg"])) from None
        sampler = Sampler(params)
        if request.must_call:
            sampler.structured_processor = self._guides.matcher(tool_call_grammar(request.callable_tools))
        elif request.guide:
            sampler.structured_processor = self._guides.matcher(guide_grammar(request.guide))

        plan = self._model.create_inference_plan(prompt)
        prompt_tokens, cached = int(plan.token_ids.shape[1]), int(plan.token_offset)
        max_tokens = self._fit(prompt_tokens, request.max_tokens)
        counters.prompt_tokens += prompt_tokens
        counters.cached_tokens += cached
        yield events.Started(index, prompt_tokens, cached)
        with wired_limit(self._model.model, [model_utils.GENERATION_STREAM]):
            logits = self._prefill(plan, cancelled, counters)
            sequence = Sequence(self._model, self._guides, plan, sampler, request, self._eos)
            if logits is not None:
                yield from sequence.run(index, logits, max_tokens, cancelled, counters)
        self._keep(plan, sequence.token_ids)

    def _fit(self, prompt_tokens: int, wanted: int | None) -> int:
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

    def _prefill(self, plan: Any, cancelled: threading.Event, counters: Counters) -> mx.array | None:
        """Runs the prompt in the plan's batches; None if the client left, and then the plan's cache holds what was run."""
        logits = None
        for (start, end), _ in plan.prompt_batches:
            if cancelled.is_set():
                return None
            logits = self._model._inference(plan.token_ids[:, start:end], cache=plan.cache, mask=None)
            mx.eval([layer.state for layer in plan.cache])
            mx.clear_cache()
            counters.processed_tokens += end - start
        return logits

    def _keep(self, plan: Any, token_ids: mx.array) -> None:
        """Saves the KV cache of what was run; a disk that does not take it costs the next request its speed, nothing else."""
        model = self._model
        kept = plan.cache[0].offset
        if not model.enable_cache or kept < model.cache_manager.min_tokens:
            return
        try:
            model.cache_manager.save_cache(plan.cache, token_ids[:, :kept], plan.offsets, model.get_empty_cache)
        except OSError as error:
            log.warning("the KV cache was not saved: %s", error)


def _read_weights(model: Any, total: int, progress: Callable[[int, int], object]) -> None:
    """Evaluates the lazily loaded weights array by array: all at once would show the whole size at once."""
    done = 0
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
        done += array.nbytes
        progress(min(done, total), total)
    progress(total, total)
