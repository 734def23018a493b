import json
import queue
import socket
import threading
from typing import Any

import pytest

from mlx_launcher.host.channel import Channel


@pytest.fixture
def ends() -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    return Channel(ours.detach()), theirs


def test_lines_arrive_in_order_and_what_is_not_json_is_passed_over(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    gone = threading.Event()
    channel.listen(messages.put, gone.set)
    theirs.sendall(b'{"type": "activ')
    theirs.sendall(b'ate"}\nnot json\n{"type": "drain"}\n')
    assert [messages.get(timeout=10)["type"] for _ in range(2)] == ["activate", "drain"]
    assert not gone.is_set()
    theirs.close()
    assert gone.wait(10)


def test_a_supervisor_that_does_not_read_never_blocks_and_loses_only_beats(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    for number in range(20_000):
        channel.send({"type": "beat", "number": number, "padding": "x" * 100})
    channel.send({"type": "ready"})
    lines = theirs.makefile("rb")
    received = [json.loads(lines.readline())]
    while received[-1]["type"] != "ready":
        # Sending goes on with what waited as soon as there is room.
        channel.send({"type": "beat", "number": -1})
        received.append(json.loads(lines.readline()))
    beats = [message["number"] for message in received if message["type"] == "beat" and message["number"] >= 0]
    assert beats == list(range(len(beats)))
    assert len(beats) < 20_000
