"""Backends by name: which block a mode means, and which of them are started here at all."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlx_launcher.config.problems import shown
from mlx_launcher.errors import EXIT_CONFIG, EXIT_FAILED, LaunchError

DEFAULT = "mlx"
# The members of a family stand for each other where only one of them is in the file: anyclaude renamed them over time.
MLX = ("mlx", "mlx-textgen", "vllm-mlx")
LEGACY = ("mlx-legacy", "vllm-mlx-legacy")
LOCAL = ("local", "lmstudio")
FAMILIES = (MLX, LEGACY, LOCAL)
CLUSTER = "mlx-cluster"
NOT_SERVED = ("openrouter", "claude")
KNOWN = (*MLX, "mlx-lm", *LEGACY, *LOCAL, CLUSTER, *NOT_SERVED)

_WHY_NOT = {
    "claude": ("mode claude uses Anthropic's own service", "Run anyclaude --mode=claude; it needs no server"),
    "openrouter": ("mode openrouter uses a service on the web", "Run anyclaude --mode=openrouter; it needs no server"),
}


def find_block(asked: str, blocks: Mapping[str, Any]) -> str:
    """The name of the block that a mode means: its own, else the only one of its family, else its own absent one.

    LaunchError `ambiguous_mode` when several of a family are there, `unknown_mode` for a name that is neither in the file
    nor known; both exit 4.
    """
    for name in (asked, asked.lower()):
        if name in blocks:
            return name
    asked = asked.lower()
    family = next((family for family in FAMILIES if asked in family), ())
    there = [name for name in family if name in blocks]
    if len(there) > 1:
        what = f"there is no backend {asked} in the file, and it could be {' or '.join(there)}"
        raise LaunchError("ambiguous_mode", what, "Name one of them with --mode", EXIT_CONFIG)
    if there:
        return there[0]
    if asked not in KNOWN:
        names = list(dict.fromkeys([*list(blocks)[:20], *KNOWN]))
        near = nearest(asked, names)
        hint = f"{f'Did you mean {near}? ' if near else ''}Known: {', '.join(map(shown, names))}"
        raise LaunchError("unknown_mode", f"there is no backend {shown(asked)}", hint, EXIT_CONFIG)
    return asked


def only_enabled(blocks: Mapping[str, Any]) -> str | None:
    """The one MLX block that is not switched off, if it is the only one."""
    names = [name for name in (*MLX, "mlx-lm") if isinstance(blocks.get(name), dict)]
    enabled = [name for name in names if blocks[name].get("enabled") is not False]
    return enabled[0] if len(enabled) == 1 else None


def why_not(block: str) -> LaunchError:
    """Why nothing is to be started for a backend of `NOT_SERVED`, or of LM Studio's without a model path."""
    what, hint = _WHY_NOT.get(block) or (
        f"mode {block} uses the server that runs already (LM Studio, for one), as its block has no modelPath",
        "Set modelPath there, or give --model, to serve one with mlx-textgen",
    )
    return LaunchError("nothing_to_start", f"{what}: nothing is to be started for it", hint, EXIT_FAILED)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, if one is like it at all."""
    import difflib

    folded = {other.lower(): other for other in known if len(other) <= 60}
    found = difflib.get_close_matches(name[:60].lower(), folded, 1, 0.7)
    return folded[found[0]] if found else None
