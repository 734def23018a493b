"""mlx-lm's own server inside our host: what is fallen back to. It serves every model that mlx-lm loads, without mlx-textgen."""

from mlx_launcher.backends.serving import Serving
from mlx_launcher.backends.textgen import host
from mlx_launcher.config.layers import Settings
from mlx_launcher.plan import Backend


def legacy(serving: Serving, settings: Settings) -> Backend:
    """The backend for a model on disk; its prompt cache is in memory."""
    return host(serving, settings, "legacy")
