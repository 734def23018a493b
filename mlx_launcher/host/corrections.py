"""mlx-textgen 0.2.1 as the host uses it: the one module that imports it, and what is corrected in it.

Every correction names the defect, has a test that fails without it, and a test that says so when upstream no longer has the
defect (tests/contract/test_upstream_defects.py). Its server, its tool-call state machine and its cache manager are not used.
It must be imported on the engine's thread: mlx_textgen makes its stream at import, and streams are thread-local.
"""

import functools
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import load_model

# mlx_textgen replaces methods of this class as soon as it is imported.
_PRISTINE = {name: vars(RotatingKVCache)[name] for name in ("update_and_fetch", "state", "trim", "is_trimmable")}

from mlx_textgen import cache_utils, sampling_utils  # noqa: E402
from mlx_textgen.chat_presets import DEFAULT_TOOL_SYSTEM  # noqa: E402
from mlx_textgen.model_utils import GENERATION_STREAM, LLMModel  # noqa: E402
from mlx_textgen.sampling_utils import SamplingParams  # noqa: E402
from mlx_textgen.tokenizer_utils import REPLACEMENT_CHAR, NaiveDetokenizer  # noqa: E402

__all__ = [
    "DEFAULT_TOOL_SYSTEM",
    "GENERATION_STREAM",
    "Sampler",
    "SamplingParams",
    "TextModel",
    "name_logit_bias_right",
    "without_cache_manager",
]


def restore_rotating_cache() -> None:
    """Gives mlx-lm its own RotatingKVCache back.

    Defect: the patch predates `make_mask`, and breaks every sliding-window model once a prompt exceeds the window ("Shapes
    (512,512) and (1,4,512,128) cannot be broadcast"); unpatched, mlx-lm runs them.
    """
    for name, method in _PRISTINE.items():
        setattr(RotatingKVCache, name, method)


# At once: whoever imports this may run a model without having asked for it.
restore_rotating_cache()


def without_cache_manager() -> None:
    """Keeps mlx-textgen from making cache directories of its own.

    Defect: their place comes from `~/.config/mlx_textgen/ENVIRONMENT/config.json`, one for all servers of a user; entries are
    keyed by the model's name; a kill while its index is written makes every later prompt a 500. kvcache/ stands in its place.
    """
    cache_utils.CacheManager = lambda **_: None


def name_logit_bias_right() -> None:
    """Makes `logit_bias` work.

    Defect: its keys are made as `logit_key` and taken as `logit_keys`, so any `logit_bias` is a TypeError.
    """
    sampling_utils.create_logit_bias_args = lambda bias: {
        "logit_keys": mx.array(list(bias)),
        "logit_bias": mx.array(list(bias.values()), dtype=mx.float32),
    }


class TextModel(LLMModel):  # type: ignore[misc]
    """mlx-textgen's model, loaded lazily and as text.

    Defects: `LLMModel` loads all weights before it returns, so a load shows no progress; and a model with a vision part is
    loaded with the vision stack, though text is all that is asked of it here.
    """

    @property
    def is_vision(self) -> bool:
        return False

    def _load_model_and_config(self, model_id_or_path: str, **_: Any) -> None:
        self._model_local_path = model_id_or_path
        self._model, self._config = load_model(Path(model_id_or_path), lazy=True)

    @property
    def detokenizer_class(self) -> Any:
        given = super().detokenizer_class
        return Detokenizer if given is NaiveDetokenizer else given


class Sampler(sampling_utils.Sampler):  # type: ignore[misc]
    """mlx-textgen's sampler, without what the parameters do not ask for.

    Defects: at temperature 0 it sorts out the best logit twice, and then draws a random number to choose it from a row of
    zeros; it writes into the logits that it is given; and the log probabilities that it tells are those of what is left when
    `temperature` and `top_k` have been applied: at temperature 0 a 0.0 for the token and -10000.0 for all others.
    """

    @property
    def looks_back(self) -> bool:
        """Whether it has to be given the tokens so far."""
        params = self.params
        return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1)

    def sample(self, logits: mx.array, token_ids: mx.array, start_index: int) -> tuple[mx.array, mx.array | None]:
        """The next token, and where the parameters ask for them the model's own log probabilities, whatever is made of them."""
        params = self.params
        if params.temperature or params.logit_bias or params.logprobs or self.looks_back:
            token, _ = super().sample(mx.array(logits), token_ids, start_index)
            return token, nn.log_softmax(logits.astype(mx.float32), axis=-1) if params.logprobs else None
        if self.structured_processor:
            logits = self.structured_processor(input_ids=token_ids, logits=logits)
        return mx.argmax(logits, axis=-1, keepdims=True), None


class Detokenizer:
    """What mlx-textgen's NaiveDetokenizer does, for one sequence: the text of tokens, as soon as its characters are whole.

    Defect: for each token it copies all tokens and all text so far, and goes through transformers' layers (90 µs a token at
    512 tokens, where this takes 10).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", True):
            self._decode = functools.partial(backend.decode, skip_special_tokens=False)
        self._waiting: list[int] = []
        self.last_segments: list[str] = []

    def add_tokens(self, token_ids: list[list[int]]) -> None:
        self._waiting += token_ids[0]
        text = self._decode(self._waiting)
        if text.endswith(REPLACEMENT_CHAR):
            self.last_segments = [""]
        else:
            self.last_segments = [text]
            self._waiting = []

    def finalize(self) -> None:
        self.last_segments = [self._decode(self._waiting).rstrip(REPLACEMENT_CHAR)]
        self._waiting = []
