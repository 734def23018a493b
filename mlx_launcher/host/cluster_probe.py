"""What `cluster check` asks of a machine: `python -m mlx_launcher.host.cluster_probe MODEL`. Prints one JSON object."""

import json
import os
import socket
import sys
from pathlib import Path

import psutil

from mlx_launcher.host.reports import versions
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.models.fingerprint import fingerprint


def _jaccl() -> bool:
    """Whether this machine's MLX could use RDMA; that it does is seen at a start."""
    try:
        import mlx.core as mx

        return bool(mx.distributed.is_available("jaccl"))
    except Exception:
        # Whatever keeps MLX from loading keeps it from that, too.
        return False


def main(model: str) -> None:
    found, wrong = None, None
    try:
        check(Path(model))
        found = fingerprint(Path(model))
    except BrokenModelError as error:
        wrong = error.reason
    except OSError as error:
        wrong = f"{model} cannot be read: {error.strerror}"
    nets = psutil.net_if_addrs().values()
    answer = {
        "versions": versions(),
        "fingerprint": found,
        "wrong": wrong,
        "addresses": [net.address for card in nets for net in card if net.family == socket.AF_INET],
        "jaccl": _jaccl(),
    }
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
