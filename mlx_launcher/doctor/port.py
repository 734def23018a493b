"""Whether the port can be had, and who has it where it cannot."""

import errno
import os
import shlex
import socket

from mlx_launcher import system
from mlx_launcher.config import defaults, urls
from mlx_launcher.doctor.check import Check, Subject
from mlx_launcher.errors import LaunchError
from mlx_launcher.system import Holder

_PROBE_S = 0.3
_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (not an address to connect to)


def port(subject: Subject) -> Check:
    """The port that `start` would take: free, ours, or a stranger's."""
    settings, instance = subject.settings, subject.instance
    if isinstance(settings, LaunchError) and settings.code == "nothing_to_start":
        return Check("port", "skipped", "nothing is to be started")
    number = subject.port
    if instance is not None and instance.running:
        pid = instance.status.get("supervisor", {}).get("pid") or instance.state.get("pid")
        return Check("port", "ok", f"{number} is ours: supervisor {pid}")
    if isinstance(settings, LaunchError):
        return Check("port", "skipped", "the configuration comes first")
    hosts, _ = urls.address(settings["host"])
    for host in hosts:
        if (why := _trouble(host, number)) is not None:
            return _taken(subject, host, why)
    return Check("port", "ok", f"{number} is free on {' and '.join(hosts)}")


def _trouble(host: str, number: int) -> int | None:
    """Why a port cannot be had, as an errno; None where it can, or where ::1 is missing, which a start does without.

    It is connected to first: on macOS a bind succeeds beside the holder of a wildcard.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_S)
            # A port of the ephemeral range can be drawn for the probe itself: then it has connected to itself.
            if (
                not probe.connect_ex((_WILDCARDS.get(host, host), number))
                and probe.getsockname() != probe.getpeername()
            ):
                return errno.EADDRINUSE
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, number))
    except OSError as error:
        return None if host == "::1" and error.errno in _NO_IPV6 else error.errno
    return None


def _taken(subject: Subject, host: str, why: int) -> Check:
    number = subject.port
    if why in (errno.EACCES, errno.EPERM):
        another = f"{subject.start} --port={defaults.PORT}"
        return Check("port", "failed", f"no permission for port {number} on {host}: choose one above 1023", another)
    if why == errno.EADDRNOTAVAIL:
        what = f"{host} is no address of this machine"
        return Check("port", "failed", what, f"{subject.start} --host=127.0.0.1")
    if why != errno.EADDRINUSE:
        return Check("port", "failed", f"port {number} on {host} cannot be bound: {os.strerror(why)}", subject.edit())
    holders = system.port_holders(number)
    left = _left_by_us(subject)
    if left is not None and any(holder["pid"] is not None and _group(holder["pid"]) == left for holder in holders):
        return Check("port", "ok", f"{number} is held by what a killed supervisor left, see leftovers")
    known = [holder for holder in holders if holder["pid"] is not None]
    what = f"port {number} on {host} is taken by {'; '.join(map(_named, known or holders)) or 'another program'}"
    pids = [str(holder["pid"]) for holder in known]
    mend = f"kill {shlex.join(pids)}" if pids else f"sudo lsof -nP -iTCP:{number} -sTCP:LISTEN"
    return Check("port", "failed", what, mend)


def _left_by_us(subject: Subject) -> int | None:
    """The process group of a server whose supervisor was killed."""
    server = subject.instance.state.get("server") if subject.instance else None
    if not isinstance(server, dict) or not isinstance(server.get("pid"), int):
        return None
    return int(server["pid"]) if system.process_alive(server["pid"], server.get("started")) else None


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _named(holder: Holder) -> str:
    if holder["pid"] is None:
        return holder["name"]
    return f"{holder['name']} (pid {holder['pid']}): {holder['cmdline'] or 'command line not readable'}"
