"""Several machines as one: which they are, how they reach each other, and how the model is split among them.

It looks which addresses are this machine's, and asks for those of the others' names; it connects to nothing.
"""

import ipaddress
import json
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict
from urllib.parse import urlsplit

from mlx_launcher.backends.serving import Serving
from mlx_launcher.backends.textgen import host
from mlx_launcher.config.defaults import STRATEGIES
from mlx_launcher.config.layers import Settings
from mlx_launcher.errors import EXIT_CONFIG, LaunchError
from mlx_launcher.models.directory import BrokenModelError, read_config
from mlx_launcher.plan import Backend

# Nothing is asked for, nothing is shared with other connections, and a dead one is noticed within eight seconds.
SSH = [
    *("-T", "-oBatchMode=yes", "-oConnectTimeout=5", "-oServerAliveInterval=2", "-oServerAliveCountMax=3"),
    *("-oControlMaster=no", "-oControlPath=none"),
]
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_INSTEAD = "Change the number of machines, distributed.strategy, or the model"
_ELSEWHERE = "Name the machines in distributed.peers, or in a file named by distributed.hostFile"


class Member(TypedDict):
    """A machine: what ssh calls it, its addresses for MLX, whether it is this one, and its RDMA devices for JACCL."""

    host: str
    ips: list[str]
    here: bool
    rdma: NotRequired[list[str | list[str] | None]]


class Machines(NamedTuple):
    """`backend` and `envs` are what a host file says of them: MLX's name for the link, "" for none, and "NAME=VALUE"s."""

    members: list[Member]
    backend: str = ""
    envs: tuple[str, ...] = ()


def cluster(serving: Serving, settings: Settings, cwd: str) -> Backend:
    """The backend for a model on this machine and the others. Why it is split as it is becomes a note.

    LaunchError `cluster_hosts` for machines that cannot be made out, `cluster_split` for a model that cannot be split so.
    """
    machines = members(settings, cwd)
    strategy, why = split(Path(serving.model["path"]), len(machines.members), settings["distributed.strategy"])
    settings.notes.append(why)
    if settings["standby"]:
        settings.notes.append("standby has no effect on a cluster")
    backend = host(serving, settings, "cluster")
    backend["env"] |= dict(text.split("=", 1) for text in machines.envs)
    backend["settings"]["cluster"] = {
        "hosts": machines.members,
        "strategy": strategy,
        "link": _link(settings, machines),
        "port": settings["distributed.port"],
        "ssh": ssh(settings),
        "python": settings["distributed.python"] or sys.executable,
        # The names alone: what an environment holds is often a key.
        "env": sorted(backend["env"]),
    }
    return backend


def ssh(settings: Settings) -> list[str]:
    """The command that is followed by a host and what is to be done there. ssh takes what it reads first: the user's own."""
    return ["ssh", *settings["distributed.sshOptions"], *SSH]


def members(settings: Settings, cwd: str) -> Machines:
    """The machines, this one first. LaunchError `cluster_hosts`."""
    if written := settings["distributed.hostFile"]:
        file = settings.base("distributed.hostFile", cwd) / os.path.expanduser(written)  # noqa: PTH111
        machines = _of_file(Path(os.path.normpath(file)))
    else:
        peers = [peer.get("host") for peer in settings["distributed.peers"]]
        nodes = (settings["discovery.nodes"] or []) if not peers else []
        machines = Machines(_with_this_one([*peers, *(_host_of(node.get("url") or "") for node in nodes)]))
    if len(machines.members) < 2:
        raise LaunchError("cluster_hosts", "the cluster is of this machine alone", _ELSEWHERE, EXIT_CONFIG)
    if not machines.members[0]["here"]:
        what = f"the first machine of the cluster, {machines.members[0]['host']}, is not this one"
        raise LaunchError("cluster_hosts", what, "Put this machine first, or start it there", EXIT_CONFIG)
    return machines


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # "http://[x"
        return None


def _with_this_one(hosts: list[str | None]) -> list[Member]:
    found: list[Member] = []
    for name in hosts:
        if not name:
            raise LaunchError("cluster_hosts", "a machine of the cluster has no name", _ELSEWHERE, EXIT_CONFIG)
        address = _address(name)
        # A list of all nodes names this one too; peers on loopback are further ranks here.
        if not (_is_here(address) and name not in _LOOPBACK):
            found.append({"host": name, "ips": [address], "here": name in _LOOPBACK})
    if not found:
        return []
    own = _own_address(found[0]["ips"][0])
    return [{"host": "127.0.0.1", "ips": [own], "here": True}, *found]


def _of_file(file: Path) -> Machines:
    """MLX's host file: `{"hosts": [{"ssh": …, "ips": […], "rdma": […]}], "backend": …, "envs": […]}`, or the list alone."""
    try:
        written = json.loads(file.read_bytes())
        written = {"hosts": written} if isinstance(written, list) else written
        found: list[Member] = []
        for entry in written["hosts"]:
            ips = [str(ipaddress.IPv4Address(ip)) for ip in entry["ips"]]
            member: Member = {"host": str(entry["ssh"]), "ips": ips, "here": _is_here(ips[0])}
            if entry.get("rdma"):
                member["rdma"] = list(entry["rdma"])
            found.append(member)
        envs = tuple(str(text) for text in written.get("envs", []))
        if not all("=" in text for text in envs):
            raise ValueError("an entry of envs is not NAME=VALUE")
        return Machines(found, str(written.get("backend") or ""), envs)
    except OSError as error:
        what = f"the host file {file} cannot be read: {error.strerror}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"{file} is no host file of MLX: {type(error).__name__}: {error}"
    hint = 'It is {"hosts": [{"ssh": "mac1", "ips": ["10.0.0.1"]}, ...]}, with at least one address for each'
    raise LaunchError("cluster_hosts", what, hint, EXIT_CONFIG)


def _address(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        hint = "Give its IPv4 address, or a host file with both the name and the address"
        raise LaunchError("cluster_hosts", f"no IPv4 address is known for {name}", hint, EXIT_CONFIG) from None


def _is_here(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True


def _own_address(peer: str) -> str:
    """The address from which this machine would reach a peer; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((peer, 9))
        except OSError as error:
            what = f"there is no way to {peer}: {error.strerror}"
            raise LaunchError("cluster_hosts", what, "Connect the machines, or correct the address") from None
        return str(sock.getsockname()[0])


def _link(settings: Settings, machines: Machines) -> str:
    """ "ring" for TCP, "jaccl" for RDMA over Thunderbolt, where a host file names a device for each pair."""
    asked = settings["distributed.connection"].lower()
    devices = all(len(member.get("rdma", [])) == len(machines.members) for member in machines.members)
    if asked == "jaccl" and not devices:
        hint = "Name them as rdma in a file named by distributed.hostFile (mlx.distributed_config writes one)"
        raise LaunchError("cluster_hosts", "JACCL wants the RDMA devices of all machines", hint, EXIT_CONFIG)
    wanted = machines.backend if asked == "auto" else asked
    return "jaccl" if wanted == "jaccl" and devices else "ring"


def split(path: Path, count: int, asked: str) -> tuple[str, str]:
    """ "tensor" or "pipeline", and why. LaunchError `cluster_split` where that cannot be."""
    try:
        config = read_config(path)
    except BrokenModelError as error:
        raise LaunchError("model_incomplete", error.reason, error.hint.rstrip(".")) from None
    # Only a cluster costs these imports.
    from mlx_launcher.models import splitting

    name, asked = config["model_type"], asked.lower()
    if asked not in STRATEGIES:
        what = f"distributed.strategy: {asked} is not known"
        raise LaunchError("config_invalid", what, f"Known: {', '.join(STRATEGIES)}", EXIT_CONFIG)
    works, against = splitting.strategies(config, count)
    for strategy in works:
        if asked in ("auto", strategy):
            why = "as it was asked for" if asked != "auto" else _why(strategy, against.get("tensor"))
            return strategy, f"{name} on {count} machines: {_SHAPES[strategy]}, {why}"
    reasons = "; ".join(f"no {way}: {why}" for way, why in against.items() if asked in ("auto", way))
    raise LaunchError("cluster_split", f"{name} cannot be split among {count} machines: {reasons}", _INSTEAD)


_SHAPES = {"tensor": "each has a part of every layer (tensor)", "pipeline": "each has some of the layers (pipeline)"}


def _why(strategy: str, against_tensor: str | None) -> str:
    if strategy == "tensor":
        return "all work on every token, and its attention heads can be shared evenly"
    return f"as tensor is not possible: {against_tensor}"
