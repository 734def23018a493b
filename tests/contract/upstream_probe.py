"""Tries mlx-textgen as it is, in a process of its own, and prints what it does as JSON: one fact for each of our corrections.

Usage: python upstream_probe.py MODEL_DIRECTORY SCRATCH_DIRECTORY (HOME points into the scratch directory).
"""

import inspect
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache
from mlx_textgen import cache_utils, engine, model_utils, rotating_kv_cache_patch, utils
from mlx_textgen.sampling_utils import Sampler, SamplingParams

MODEL, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
facts: dict[str, Any] = {}


def raised(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def on_another_thread(action: Callable[[], object]) -> str | None:
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(raised(action)))
    thread.start()
    thread.join()
    return outcome[0]


def manager(name: str) -> Any:
    return cache_utils.CacheManager(name, min_tokens=1)


before = mx.get_active_memory()
model = model_utils.LLMModel(str(MODEL), verbose=False, enable_cache=False)
facts["bytes_loaded_by_the_constructor"] = mx.get_active_memory() - before
facts["generates_on_another_thread"] = on_another_thread(
    lambda: mx.eval(model._inference(mx.array([[1, 2]]), cache=model.get_empty_cache(), mask=None))
)
facts["cache_directory"] = utils.get_prompt_cache_dir()
facts["wired_limit"] = raised(lambda: model_utils.wired_limit(model.model).__enter__())
facts["streamed_auto_compares_a_list"] = "len([s for s in status if status == 'tool_call_start'])" in inspect.getsource(
    engine.InferenceEngine.chat_generate
)
bias = SamplingParams(logit_bias={1: 1.0})
facts["logit_bias"] = raised(lambda: Sampler(bias).sample(mx.zeros((1, 8)), mx.array([[1]]), 0))
told = Sampler(SamplingParams(logprobs=True)).sample(mx.array([[1.0, 2.0]]), mx.array([[1]]), 0)[1]
facts["logprob_of_a_likely_token"] = told[0, 1].item()
facts["patches_rotating_cache"] = RotatingKVCache.update_and_fetch is rotating_kv_cache_patch.new_update_and_fetch

torn = manager("torn")
Path(torn.cache_info_dir).write_text('{"cache_0": {"token_ids": [1, 2')
facts["torn_index"] = raised(lambda: torn.cache_info)

missing = manager("missing")
Path(missing.cache_info_dir).write_text('{"cache_0": {"token_ids": [1, 2, 3], "last_modified": 1.0}}')
tokens, offsets = mx.array([[1, 2, 3, 4]]), mx.array([0])
facts["missing_entry"] = raised(lambda: missing.get_cache(model.get_empty_cache, tokens, offsets, [None]))

seeing = SCRATCH / "seeing"
shutil.copytree(MODEL, seeing)
config = json.loads((seeing / "config.json").read_text())
(seeing / "config.json").write_text(json.dumps({**config, "vision_config": {"model_type": "none"}}))
facts["vision_model"] = raised(lambda: model_utils.LLMModel(str(seeing), verbose=False))
facts["imports_vision_stack"] = "mlx_vlm" in sys.modules

# A disk that is full after 4 KiB.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = model.get_empty_cache()
model._inference(mx.zeros((1, 64), dtype=mx.int32), cache=cache, mask=None)
mx.eval([layer.state for layer in cache])
entry = SCRATCH / "cache_0.safetensors"
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
raised(lambda: cache_utils.save_cache(cache, str(entry), "m"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
facts["bytes_left_by_a_full_disk"] = entry.stat().st_size if entry.exists() else None

sys.stdout.write(json.dumps(facts))
sys.stdout.flush()
# MLX has worked on another thread: interpreter teardown may abort.
os._exit(0)
