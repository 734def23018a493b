"""The values in force, as a person or a script may see them: keys masked, units as the file writes them."""

from typing import Any

from mlx_launcher.config.layers import DURATIONS, Settings
from mlx_launcher.config.values import duration_text

MASK = "********"


def rows(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every value by its key with its origin: `{"port": {"value": 8081, "origin": "default"}}`; the mode is the first."""
    mode = {"value": settings.block, "origin": settings.asked.origin}
    return {"mode": mode} | {
        key: {"value": _presentable(key, value.value), "origin": value.origin} for key, value in settings.values.items()
    }


def _presentable(key: str, value: Any) -> Any:
    if key == "apiKey":
        return MASK if value else None
    if key == "env":  # whatever an environment holds, it is often a key
        return dict.fromkeys(value, MASK)
    return duration_text(value) if key in DURATIONS else value
