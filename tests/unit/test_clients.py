"""Who asks the supervisor, and who left before it could listen."""

import errno
import os
import selectors
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_launcher.supervisor.clients import Clients


class Listener(socket.socket):
    """Gives what it is told to, and errors as accept(2) has them."""

    waiting: list[socket.socket | int]

    def accept(self) -> tuple[socket.socket, Any]:
        first = self.waiting.pop(0)
        if isinstance(first, int):
            raise OSError(first, os.strerror(first))
        return first, None


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.mark.parametrize(("number", "stays"), [(errno.EAGAIN, True), (errno.ECONNABORTED, True), (errno.EMFILE, False)])
def test_who_left_while_it_waited_costs_nobody_else_the_place(listener: Listener, number: int, stays: bool) -> None:
    ours, theirs = socket.socketpair()
    listener.waiting = [theirs, number]
    with ours, selectors.DefaultSelector() as selector:
        clients = Clients(selector, lambda request: b"answer", most=2, max_request=100)
        clients.accept(listener)
        clients.accept(listener)
        assert len(selector.get_map()) == stays
        clients.close()
