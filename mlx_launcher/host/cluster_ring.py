"""What MLX wants to know on each machine to make one engine of them; what `mlx.launch` would tell it."""

import contextlib
import json
import socket
from typing import Any

from mlx_launcher.host.settings import Membership


def memberships(cluster: dict[str, Any]) -> list[Membership]:
    """For each rank of a plan's `settings["cluster"]` its place in the cluster."""
    hosts = cluster["hosts"]
    environment, files = _jaccl(cluster) if cluster["link"] == "jaccl" else ({}, _ring(cluster))
    return [
        {
            "rank": rank,
            "size": len(hosts),
            "strategy": cluster["strategy"],
            "link": cluster["link"],
            "environment": environment,
            "files": files,
        }
        for rank in range(len(hosts))
    ]


def advice(cluster: dict[str, Any]) -> str:
    """What to look at when ranks that run do not find each other."""
    addresses = ", ".join(host["ips"][0] for host in cluster["hosts"])
    return f"Check that the machines reach each other at {addresses} from port {cluster['port']} on"


def _ring(cluster: dict[str, Any]) -> dict[str, str]:
    """Each machine's addresses, with ports that count on from the first one, as `mlx.launch` gives them."""
    port = cluster["port"]
    addresses = [ip for host in cluster["hosts"] for ip in host["ips"]]
    # On one machine alone any port will do, and several clusters must not meet.
    here = all(host["here"] for host in cluster["hosts"])
    ports = _free_ports(addresses) if here else list(range(port, port + len(addresses)))
    numbered = iter(ports)
    return {"MLX_HOSTFILE": json.dumps([[f"{ip}:{next(numbered)}" for ip in host["ips"]] for host in cluster["hosts"]])}


def _jaccl(cluster: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Rank 0 coordinates; every machine knows the RDMA devices of all."""
    hosts = cluster["hosts"]
    environment = {"MLX_JACCL_COORDINATOR": f"{hosts[0]['ips'][0]}:{cluster['port']}", "MLX_METAL_FAST_SYNCH": "1"}
    return environment, {"MLX_IBV_DEVICES": json.dumps([host["rdma"] for host in hosts])}


def _free_ports(addresses: list[str]) -> list[int]:
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server((address, 0))) for address in addresses]
        return [sock.getsockname()[1] for sock in bound]
