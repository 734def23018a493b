"""The tensors of a model whose weights are not on this machine: those that mlx-lm builds for its config.json.

They are built in a process of their own, and never computed: MLX is lazy, so even the largest model takes no memory there.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.architectures import architecture, mlx_lm_is_installed
from mlx_launcher.models.facts import Tensors, text_part, unknown, weights_dtype

_BUILD_S = 60.0  # importing mlx-lm is nearly all of it, 2 s on two Linux cores
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Packed as `mlx_lm.convert` packs: what the configuration names as it says, else all that can be packed.
_BUILD = """
import json, sys
import mlx.core as mx, mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
mx.set_default_device(mx.cpu)
config = json.load(sys.stdin)
kind, arguments = _get_classes(config)
model = kind(arguments.from_dict(config))
packing = config.get("quantization") or config.get("quantization_config")
if packing:
    def packed(path, module):
        if path in packing:
            return packing[path]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % packing["group_size"] == 0
    mode = packing.get("mode", "affine")
    nn.quantize(model, packing["group_size"], packing["bits"], mode=mode, class_predicate=packed)
kinds = {mx.uint32: "U32", mx.uint8: "U8"}
print(json.dumps({name: [kinds.get(tensor.dtype), tensor.shape] for name, tensor in tree_flatten(model.parameters())}))
"""


def outline(config: dict[str, Any]) -> Tensors:
    """Type and shape of every tensor.

    LaunchError `architecture_unsupported` for one that mlx-lm does not know, `model_unsupported` where it cannot build the model.
    """
    if architecture(config) is None and mlx_lm_is_installed():
        raise unknown(config["model_type"])
    packing = config.get("quantization") or config.get("quantization_config")
    if isinstance(packing, dict) and not {"bits", "group_size"} <= packing.keys():
        raise _unsupported(config, f"it does not say which weights are packed how ({packing.get('quant_method')})")
    command = [sys.executable, "-P", "-c", _BUILD]
    said = json.dumps(config)
    try:
        done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=_BUILD_S, check=False)
        built = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise _unsupported(config, f"it took more than {_BUILD_S:g} s") from None
    except (ValueError, IndexError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _unsupported(config, lines[-1] if lines else f"it ended with {done.returncode}") from None
    dtype = _SAFETENSORS[weights_dtype({}, text_part(config))]
    return {name: (kind or dtype, tuple(dims)) for name, (kind, dims) in built.items()}


def _unsupported(config: Mapping[str, Any], why: str) -> LaunchError:
    what = f"mlx-lm cannot build a {config['model_type']} from this config.json alone: {why}"
    return LaunchError("model_unsupported", what, "Download the model and try again: its files tell more")
