"""Binds the port before any server exists. The sockets stay open while servers come and go."""

import errno
import selectors
import socket
from collections.abc import Callable
from typing import Any

from mlx_launcher.errors import EXIT_PORT_TAKEN, LaunchError

BACKLOG = 512  # macOS cuts it to 128
PROBE_S = 0.5

_ANY = "0.0.0.0"  # noqa: S104 (recognised here, bound only when the plan says so)
_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class Port:
    """The listening sockets of a plan: owned, or released to a server that binds the port itself."""

    def __init__(self, hosts: list[str], port: int, note: Callable[..., None]) -> None:
        self.sockets: list[socket.socket] = []
        self._hosts, self._port, self._note = hosts, port, note

    def own(self) -> None:
        """Binds every host, if it is not bound. LaunchError as `bind_all`."""
        if not self.sockets:
            self.sockets = bind_all(self._hosts, self._port, self._note)

    def regain(self) -> str | None:
        """Binds again what was released; why that cannot be."""
        try:
            self.own()
        except LaunchError as error:
            return error.message
        return None

    def release(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = []

    def hosts(self) -> list[str]:
        """The addresses that are bound."""
        return [str(sock.getsockname()[0]) for sock in self.sockets]


class Watch:
    """Tells of somebody who connects, while nobody accepts. With a server it must be off: who waits keeps a listener readable.

    It has to be off before the port is released.
    """

    def __init__(self, selector: selectors.BaseSelector, port: Port, call: Callable[[], object]) -> None:
        self._selector, self._port, self._call = selector, port, call
        self._watched: list[socket.socket] = []

    def set(self, on: bool) -> None:
        if bool(self._watched) is on:
            return
        for sock in self._watched:
            self._selector.unregister(sock)
        self._watched = list(self._port.sockets) if on else []
        for sock in self._watched:
            self._selector.register(sock, selectors.EVENT_READ, lambda mask: self._call())


def bind_all(hosts: list[str], port: int, note: Callable[..., None]) -> list[socket.socket]:
    """Listening, non-blocking sockets on every host. `note(event, **fields)` takes what the journal should say.

    `::1` is left out where the machine has no IPv6. Raises LaunchError `port_in_use` (with the holder's name and pid) when
    anybody has the port on any of the addresses, and `bind_failed` for an address or port that is not ours to bind.
    """
    bound: list[socket.socket] = []
    try:
        for family, address in _resolve(hosts, port):
            try:
                if _answers(family, address):
                    raise OSError(errno.EADDRINUSE, "in use")
                bound.append(_bind(family, address))
            except OSError as error:
                if address[0] == "::1" and error.errno in _NO_IPV6:
                    note("listener_left_out", host="::1", reason=error.strerror)
                    continue
                raise _refusal(address[0], port, error) from error
        if not bound:
            raise LaunchError("bind_failed", f"no address of {', '.join(hosts)} can be bound", "Choose another host")
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    return bound


def _resolve(hosts: list[str], port: int) -> list[tuple[socket.AddressFamily, Any]]:
    found: dict[tuple[socket.AddressFamily, Any], None] = {}
    for host in hosts:
        try:
            for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
                found[info[0], info[4]] = None
        except (OSError, UnicodeError) as error:
            raise LaunchError("bind_failed", f"the host {host!r} is not known ({error})", "Use an address") from error
    return list(found)


def _answers(family: socket.AddressFamily, address: Any) -> bool:
    """Whether somebody accepts connections there: on macOS a bind succeeds beside the holder of a wildcard."""
    host = str(address[0])
    host = {_ANY: "127.0.0.1", "::": "::1"}.get(host, host)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect((host, *address[1:]))
            # A port of the ephemeral range can be drawn for the probe itself: then it has connected to itself.
            return bool(probe.getsockname() != probe.getpeername())
        except TimeoutError:
            return host == "::1" or host.startswith("127.")  # a full queue: on loopback nothing else is silent
        except OSError:
            return False


def _bind(family: socket.AddressFamily, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _refusal(host: str, port: int, error: OSError) -> LaunchError:
    if error.errno == errno.EADDRINUSE:
        hint = "Stop it, or choose another port with --port"
        return LaunchError("port_in_use", f"port {port} on {host} is taken by {_holders(port)}", hint, EXIT_PORT_TAKEN)
    if error.errno in (errno.EACCES, errno.EPERM):
        return LaunchError("bind_failed", f"no permission for port {port} on {host}", "Choose a port above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        message = f"{host} is not an address of this machine"
        return LaunchError("bind_failed", message, "Choose one that is, such as 127.0.0.1")
    return LaunchError("bind_failed", f"port {port} on {host} cannot be bound: {error.strerror}", "Choose another")


def _holders(port: int) -> str:
    from mlx_launcher import system

    try:
        holders = system.port_holders(port)
    except Exception:  # who it is only completes the message
        holders = []
    named = [h for h in holders if h["pid"] is not None] or holders
    texts = [
        h["name"]
        if h["pid"] is None
        else f"{h['name']} (pid {h['pid']}): {h['cmdline'] or 'command line not readable'}"
        for h in named
    ]
    return "; ".join(texts) or "another program"
