"""mlx-textgen's engine inside our own host: borrows the socket, proves itself, keeps its KV cache on disk."""

import os
import sys
from pathlib import Path
from typing import Literal

from mlx_launcher.backends.serving import Serving
from mlx_launcher.config import defaults
from mlx_launcher.config.layers import Settings
from mlx_launcher.plan import Backend


def textgen(serving: Serving, settings: Settings) -> Backend:
    """The backend for a model on disk. A key that is not required is accepted and not asked for."""
    return host(serving, settings, "textgen")


def prompt_files(settings: Settings) -> list[Path]:
    """What `warmup.promptFiles` names, absolute."""
    base = settings.base("warmup.promptFiles", "/")
    return [base / os.path.expanduser(file) for file in settings["warmup.promptFiles"]]  # noqa: PTH111


def host(serving: Serving, settings: Settings, name: Literal["textgen", "legacy", "cluster"]) -> Backend:
    """One of the servers that our host runs; all are told the same."""
    state = serving.instance.parent
    cache = settings["cache.dir"]
    if cache is not None:
        cache = os.path.normpath(settings.base("cache.dir", "/") / os.path.expanduser(cache))  # noqa: PTH111
    return {
        "name": settings.block,
        "kind": "host",
        # -P: the directory that it runs in may hold a json.py.
        "argv": [sys.executable, "-P", "-m", "mlx_launcher.host", "--imports", str(state / "transformers.json"), name],
        # UTF8: mlx-lm and transformers read a model's texts in the locale's encoding, which may be less.
        "env": {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **settings["env"]},
        "cwd": None,
        "settings": {
            "model_path": serving.model["path"],
            "model_id": serving.model["id"],
            "names": serving.names,
            "accept_any_model": settings["acceptAnyModel"],
            "api_key": serving.api_key,
            "require_key": serving.require_key,
            "max_queue": settings["maxQueue"],
            "max_body_bytes": defaults.MAX_BODY_BYTES,
            "prefill_batch": defaults.PREFILL_BATCH,
            "warmup": list(map(str, prompt_files(settings))),
            "cache": {
                "enabled": settings["cache.enable_cache"],
                "dir": cache or str(state / "kvcache"),
                "slots": settings["cache.cache_slots"],
                "min_tokens": settings["cache.min_tokens_for_cache"],
                "memory_bytes": settings["cache.memoryBytes"],
                "max_bytes": settings["cache.maxBytes"],
            },
        },
    }
