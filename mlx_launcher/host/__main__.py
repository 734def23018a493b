"""A server process: `python -m mlx_launcher.host [--imports FILE] BACKEND --channel FD --listen FD[,FD]`.

A "cluster" is the leader of several processes, each of which is a "rank": on another machine with `--channel stdio`.
"""

import argparse
import os
import resource
import sys


def _inherited() -> argparse.Namespace:
    """Reads the arguments and, before anything heavy is imported, keeps grandchildren from inheriting what we did."""
    parser = argparse.ArgumentParser(prog="mlx_launcher.host")
    parser.add_argument("backend", choices=["textgen", "legacy", "cluster", "rank"])
    parser.add_argument("--channel", type=lambda text: None if text == "stdio" else int(text), required=True)
    parser.add_argument("--imports", help="where is kept what an import has learned")
    parser.add_argument("--listen", type=lambda text: [int(part) for part in text.split(",")], default=[])
    arguments = parser.parse_args()
    for descriptor in [arguments.channel, *arguments.listen]:
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    return arguments


def _quiet_libraries() -> None:
    # The host reads local directories only; a library that looked on the hub would hang or fail there.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    # What a host writes holds pieces of conversations: for its owner alone.
    os.umask(0o077)
    # And a core dump would hold whole ones, where nobody expects them.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    inherited = _inherited()
    _quiet_libraries()
    if inherited.imports:
        from mlx_launcher.host.imports import remember_exports

        remember_exports(inherited.imports)
    if inherited.channel is None:
        from mlx_launcher.host.cluster_guard import watch_over

        watch_over()
    elif inherited.backend == "cluster":
        from mlx_launcher.host.cluster import run
    elif inherited.backend in ("legacy", "rank"):
        from mlx_launcher.host.legacy import run
    else:
        from mlx_launcher.host.server import run
    run(inherited.channel, inherited.listen)
    sys.exit("unreachable: run() ends the process")
