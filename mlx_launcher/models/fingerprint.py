"""Which model a directory holds, told from its files: two models of one name must never share a KV cache."""

import hashlib
from pathlib import Path

from mlx_launcher.models.directory import weight_files
from mlx_launcher.models.safetensors import data_start, read_header

_TEXTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
_SAMPLE_BYTES = 4096


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits over the small files whole and the beginning of every tensor. OSError, or TornFileError.

    Reading a 17 GB model whole would take longer than loading it needs. A fine-tune may change a hundredth of the weights, the
    attention of some layers, but what it changes it changes all through.
    """
    digest = hashlib.sha256()
    for name in _TEXTS:
        file = path / name
        digest.update(name.encode())
        digest.update(file.read_bytes() if file.is_file() else b"-")
    for weights in weight_files(path):
        size = weights.stat().st_size
        digest.update(f"{weights.name} {size}".encode())
        start = data_start(weights)
        with weights.open("rb") as file_of_weights:
            for name, tensor in sorted(read_header(weights).items()):
                begin, end = tensor["data_offsets"]
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                file_of_weights.seek(start + begin)
                digest.update(file_of_weights.read(min(end - begin, _SAMPLE_BYTES)))
    return digest.hexdigest()[:16]
