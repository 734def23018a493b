"""A cluster's server process without a supervisor, and programs that stand in for ssh."""

import contextlib
import random
import socket
import sys
from pathlib import Path
from typing import Any

from support.hosts import Host
from support.waiting import free_port

# What is asked of the other machine is its last word.
THROUGH = '#!/bin/sh\nfor word; do :; done\nexec sh -c "$word"\n'


def two_ports() -> int:
    """A port that is free with the next one, below those that the system gives to others meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        both = (("127.0.0.1", port), ("127.0.0.1", port + 1))
        with contextlib.suppress(OSError), socket.create_server(both[0]), socket.create_server(both[1]):
            return port


def program(directory: Path, text: str) -> str:
    file = directory / "ssh"
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def cluster_host(model: Path, directory: Path, ssh: str, **cluster: Any) -> Host:
    """Rank 0 here, and rank 1 at the other end of `ssh`."""
    settings = {
        "hosts": [
            {"host": "127.0.0.1", "ips": ["127.0.0.1"], "here": True},
            {"host": "other", "ips": ["127.0.0.1"], "here": False},
        ],
        "strategy": "tensor",
        "link": "ring",
        "port": two_ports(),
        "ssh": [ssh],
        "python": sys.executable,
        "env": [],
        **cluster,
    }
    return Host(model, free_port(), directory / "none", backend="cluster", settings={"cluster": settings})
