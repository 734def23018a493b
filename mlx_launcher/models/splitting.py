"""How mlx-lm can split a model among hosts: the one decision, for a cluster's plan and for the arithmetic of its size."""

from typing import Any, Literal

from mlx_launcher.models.architectures import architecture
from mlx_launcher.models.facts import KV_HEADS, LAYERS, number, text_part

Strategy = Literal["single", "tensor", "pipeline"]

_UNKNOWN = "the installed mlx-lm does not know this architecture"
# What `shard` of mlx-lm's models (0.32) divides by the number of hosts.
_HEADS = {
    "attention head": ("num_attention_heads", "n_heads", "n_head"),
    "key-value head": KV_HEADS,
    "linear key head": ("linear_num_key_heads",),
    "linear value head": ("linear_num_value_heads",),
}


def strategies(config: dict[str, Any], hosts: int) -> tuple[list[Strategy], dict[Strategy, str]]:
    """Those that work for so many hosts, the one to be preferred first; and why the others do not.

    What the configuration does not tell is not held against it: that is found when mlx-lm loads it.
    """
    if hosts == 1:
        return ["single"], {}
    against: dict[Strategy, str | None] = {
        "tensor": _against_tensor(config, hosts),
        "pipeline": _against_pipeline(config, hosts),
    }
    works = [name for name, why in against.items() if why is None]
    return works, {name: why for name, why in against.items() if why is not None}


def _against_tensor(config: dict[str, Any], hosts: int) -> str | None:
    loaded_by, text = architecture(config), text_part(config)
    if loaded_by is None:
        return _UNKNOWN
    if not loaded_by.tensor:
        return "mlx-lm has no tensor parallelism for this architecture"
    for what, keys in _HEADS.items():
        count = number(text, *keys)
        split = loaded_by.splits_kv_heads or keys != KV_HEADS
        if split and count is not None and count % hosts:
            return f"its {count} {what}{'s'[: count != 1]} cannot be divided by {hosts}"
    return None


def _against_pipeline(config: dict[str, Any], hosts: int) -> str | None:
    loaded_by, layers = architecture(config), number(text_part(config), *LAYERS)
    if loaded_by is None:
        return _UNKNOWN
    if not loaded_by.pipeline:
        return "mlx-lm has no pipeline for this architecture"
    return f"it has {layers} layer{'s'[: layers != 1]}" if layers is not None and layers < hosts else None
