"""Whether a model fits into this machine: its weights and the keys and values of one long prompt against what there is."""

from pathlib import Path
from typing import Literal

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.directory import BrokenModelError
from mlx_launcher.models.facts import Facts, facts
from mlx_launcher.system.memory import Memory, model_memory

Fits = Literal["yes", "tight", "no"]

PROMPT_TOKENS = 8192
# Beyond this share nothing is left for longer prompts, more kept prompts, and everything else that runs.
_TIGHT = 0.9


def needed_bytes(model: Facts) -> int:
    """The weights, and one prompt of PROMPT_TOKENS."""
    return model.weight_bytes + _prompt_bytes(model)


def judge(model: Facts, memory: Memory) -> Fits:
    """ "tight" is over nine tenths of what there is."""
    return judge_bytes(needed_bytes(model), memory)


def judge_bytes(needed: int, memory: Memory) -> Fits:
    """The same for a number of bytes."""
    return "no" if needed > memory.bytes_ else "tight" if needed > _TIGHT * memory.bytes_ else "yes"


def check(path: Path, force: bool, memory: Memory | None = None) -> None:
    """LaunchError `model_too_large` with the numbers, unless `force`. `memory` is this machine's where None is given.

    A model that cannot be read is not judged here, and where the system does not tell its memory every model fits.
    """
    if force or (memory := memory or model_memory()) is None:
        return
    try:
        model = facts(path)
    except BrokenModelError:
        return
    if judge(model, memory) == "no":
        raise LaunchError("model_too_large", _numbers(path, model, memory), _HINT)


_HINT = "Choose a smaller model or one of fewer bits, or try it all the same with --force"


def _numbers(path: Path, model: Facts, memory: Memory) -> str:
    prompt = f" and {_gigabytes(_prompt_bytes(model))} for a prompt of {PROMPT_TOKENS:,} tokens"
    return (
        f"{path} needs {_gigabytes(needed_bytes(model))} ({_gigabytes(model.weight_bytes)} of weights"
        f"{prompt if _prompt_bytes(model) else ''}), this machine has {_gigabytes(memory.bytes_)} for it ({memory.what})"
    )


def _prompt_bytes(model: Facts) -> int:
    return (model.kv_bytes_per_token or 0) * min(PROMPT_TOKENS, model.context or PROMPT_TOKENS)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
