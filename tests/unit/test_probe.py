"""What counts as a refusal, and what the supervisor lacks itself, on a machine that is short of something."""

import errno
import os
import selectors
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.waiting import free_port

from mlx_launcher.supervisor.probe import LOOK_S, Probe


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


@pytest.fixture
def probe(heard: list[str], selector: selectors.BaseSelector) -> Iterator[Probe]:
    """Of a server that proved itself on both addresses and is gone now."""
    made = Probe(selector, ["127.0.0.1", "::1"], free_port(), {}, lambda message: heard.append(message["type"]))
    made.watch()
    yield made
    made.close()


def asks(probe: Probe, selector: selectors.BaseSelector, times: int) -> None:
    for n in range(times):
        probe.poll(n * LOOK_S)
        for key, mask in selector.select(0):
            key.data(mask)


def fails(monkeypatch: pytest.MonkeyPatch, number: int, *families: int) -> None:
    real = socket.socket

    def socket_(family: int, *rest: Any) -> socket.socket:
        if family in families:
            raise OSError(number, os.strerror(number))
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", socket_)


def test_refused_everywhere_it_is_gone(probe: Probe, selector: selectors.BaseSelector, heard: list[str]) -> None:
    asks(probe, selector, 20)
    assert set(heard) == {"refused"}


def test_without_ipv6_the_other_address_tells(
    probe: Probe, selector: selectors.BaseSelector, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, errno.EAFNOSUPPORT, socket.AF_INET6)
    asks(probe, selector, 20)
    assert set(heard) == {"refused"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_what_we_lack_ourselves_says_nothing_about_a_server(
    probe: Probe, selector: selectors.BaseSelector, heard: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fails(monkeypatch, number, socket.AF_INET, socket.AF_INET6)
    asks(probe, selector, 20)
    assert heard == []
