"""mlx-textgen 0.2.1 as the host uses it: the one module that imports it, and what is corrected in it.

Every correction names the defect, has a test that fails without it, and a test that says so when upstream no longer has the
defect (tests/contract/test_upstream_defects.py). Its server, its tool-call state machine and its cache manager are not used.
It must be imported on the engine's thread: mlx_textgen makes its stream at import, and streams are thread-local.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import load_model

# mlx_textgen replaces methods of this class as soon as it is imported.
_PRISTINE = {name: vars(RotatingKVCache)[name] for name in ("update_and_fetch", "state", "trim", "is_trimmable")}

from mlx_textgen import cache_utils, sampling_utils  # noqa: E402
from mlx_textgen.chat_presets import DEFAULT_TOOL_SYSTEM  # noqa: E402
from mlx_textgen.model_utils import GENERATION_STREAM, LLMModel  # noqa: E402
from mlx_textgen.sampling_utils import Sampler, SamplingParams  # noqa: E402

__all__ = [
    "DEFAULT_TOOL_SYSTEM",
    "GENERATION_STREAM",
    "Sampler",
    "SamplingParams",
    "TextModel",
    "name_logit_bias_right",
    "restore_rotating_cache",
    "without_cache_manager",
]


def restore_rotating_cache() -> None:
    """Gives mlx-lm its own RotatingKVCache back.

    Defect: the patch predates `make_mask`, and breaks every sliding-window model once a prompt exceeds the window ("Shapes
    (512,512) and (1,4,512,128) cannot be broadcast"); unpatched, mlx-lm runs them.
    """
    for name, method in _PRISTINE.items():
        setattr(RotatingKVCache, name, method)


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
