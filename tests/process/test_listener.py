"""Who may have the port, and what is said when it is somebody else."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.supervised import Launched
from support.waiting import free_port

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor import listener

Launch = Callable[..., Launched]
HOSTS = ["127.0.0.1", "::1"]


def nothing(event: str, **_: Any) -> None:
    raise AssertionError(event)


@pytest.fixture
def bound() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def test_both_loopbacks_are_bound(port: int, bound: list[socket.socket]) -> None:
    bound += listener.bind_all(HOSTS, port, nothing)
    assert [sock.getsockname()[:2] for sock in bound] == [("127.0.0.1", port), ("::1", port)]
    assert not any(sock.getblocking() or sock.get_inheritable() for sock in bound)
    for host in HOSTS:
        socket.create_connection((host, port), timeout=2).close()


def test_ipv6_never_takes_ipv4_along(port: int, bound: list[socket.socket]) -> None:
    bound += listener.bind_all(["::", "0.0.0.0"], port, nothing)
    assert bound[0].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_refusal_leaves_nothing_bound(port: int) -> None:
    with socket.socket(socket.AF_INET6) as stranger:
        stranger.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        stranger.bind(("::1", port))
        stranger.listen()
        with pytest.raises(LaunchError, match=str(os.getpid())):
            listener.bind_all(HOSTS, port, nothing)
    for sock in listener.bind_all(HOSTS, port, nothing):
        sock.close()


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_a_machine_without_ipv6_serves_on_ipv4(
    port: int, bound: list[socket.socket], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = socket.socket

    def no_ipv6(family: int, *rest: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(number, os.strerror(number))
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", no_ipv6)
    notes: list[tuple[str, str]] = []
    bound += listener.bind_all(HOSTS, port, lambda event, **fields: notes.append((event, fields["host"])))
    assert [sock.getsockname()[0] for sock in bound] == ["127.0.0.1"]
    assert notes == [("listener_left_out", "::1")]
    with pytest.raises(LaunchError) as caught:
        listener.bind_all(["::1"], port, lambda event, **fields: None)
    assert caught.value.code == "bind_failed"


def test_no_permission(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int, address: Any) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listener, "_bind", refuse)
    with pytest.raises(LaunchError, match="no permission for port"):
        listener.bind_all(HOSTS, port, nothing)


def test_a_probe_that_meets_itself_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux a connect to a free port of the ephemeral range can be answered by its own socket."""
    port = free_port()

    class Bound(socket.socket):
        def connect(self, address: Any) -> None:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(("127.0.0.1", port))
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Bound)
    assert listener._answers(socket.AF_INET, ("127.0.0.1", port)) is False
