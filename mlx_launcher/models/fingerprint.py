"""Which model a directory holds, told from its files: two models of one name must never share a KV cache."""

import hashlib
from pathlib import Path

from mlx_launcher.models.directory import weight_files

_TEXTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits over the small files whole and samples of the weights, spread over each file with its size.

    Reading a 17 GB model whole would take longer than loading it needs; a fine-tune changes nearly every block.
    """
    digest = hashlib.sha256()
    for name in _TEXTS:
        file = path / name
        digest.update(name.encode())
        digest.update(file.read_bytes() if file.is_file() else b"-")
    for weights in weight_files(path):
        size = weights.stat().st_size
        digest.update(f"{weights.name} {size}".encode())
        with weights.open("rb") as file_of_weights:
            for sample in range(_SAMPLES):
                file_of_weights.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file_of_weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
