"""Addresses and URLs as a configuration writes them."""

import ipaddress
import socket
from urllib.parse import urlsplit

from mlx_launcher.config import defaults

_HERE = (defaults.HOST, "localhost", "::1", "0.0.0.0", "::")  # noqa: S104
_ANY = ("0.0.0.0", "::")  # noqa: S104


def address(host: str) -> tuple[list[str], bool]:
    """The addresses to bind for `host`, and whether only this machine can reach them. ValueError for a name."""
    if host in (defaults.HOST, "localhost"):
        return list(defaults.LOOPBACK), True
    try:
        return [host], ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"an address is wanted, not {host[:60]!r}") from None


def client_url(host: str, port: int) -> str:
    """What clients on this machine use: a wildcard is no address to connect to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def port_here(url: str, host: str | None) -> int:
    """The port in the URL of a server that listens on `host`; ValueError says why it cannot be one of this machine."""
    try:
        parts = urlsplit(url.strip())
        port, name = parts.port, parts.hostname or ""
    except ValueError:
        raise ValueError("this is no URL") from None
    if parts.scheme == "https":
        raise ValueError("a server here speaks http, not https")
    if parts.scheme != "http" or not name:
        raise ValueError("this is no http URL")
    if parts.path.rstrip("/") != "/v1":
        ends = f"ends in {parts.path[:60]!r}" if parts.path else "has no path"
        raise ValueError(f"the server answers under /v1, and the URL {ends}")
    if name not in _HERE and not _is_loopback(name) and name != host:
        if not is_this_machine(name):
            raise ValueError(f"{name[:60]} is another machine: a server is started on this one only")
        if host not in _ANY:
            raise ValueError(f"nothing listens on {name[:60]} unless host is set to it")
    if port == 0:
        raise ValueError("port 0 is none")
    return 80 if port is None else port


def is_this_machine(name: str) -> bool:
    """Whether an address, or a host name, is this machine's own. Asks no name server."""
    if name == socket.gethostname().lower():
        return True
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(name).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((name, 0))
    except (ValueError, OSError):
        return False
    return True


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
