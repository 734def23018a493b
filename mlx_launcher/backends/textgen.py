"""mlx-textgen's engine inside our own host: borrows the socket, proves itself, keeps its KV cache on disk."""

import sys
from pathlib import Path

from mlx_launcher.backends.models import served_names
from mlx_launcher.config import defaults
from mlx_launcher.plan import Backend, Model


def textgen(name: str, model: Model, instance: Path, api_key: str | None = None, require_key: bool = False) -> Backend:
    """The backend called `name`, for a model on disk; `instance` is the directory that its KV cache goes into.

    `require_key` demands `api_key` of every request; without it a key is accepted and not asked for.
    """
    return {
        "name": name,
        "kind": "host",
        # -P: the directory that it runs in may hold a json.py.
        "argv": [sys.executable, "-P", "-m", "mlx_launcher.host", "textgen"],
        "env": {"PYTHONUNBUFFERED": "1"},
        "cwd": None,
        "settings": {
            "model_path": model["path"],
            "model_id": model["id"],
            "names": served_names(model["id"], model["path"]),
            "accept_any_model": True,
            "api_key": api_key,
            "require_key": require_key,
            "max_queue": defaults.MAX_QUEUE,
            "max_body_bytes": defaults.MAX_BODY_BYTES,
            "prefill_batch": defaults.PREFILL_BATCH,
            "cache": {
                "enabled": True,
                "dir": str(instance / "kvcache"),
                "slots": defaults.CACHE_SLOTS,
                "min_tokens": defaults.CACHE_MIN_TOKENS,
            },
        },
    }
