"""The files of prompts that are run before somebody asks: what is none costs a note, and no more."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_launcher.host.warmup import MAX_BYTES, Warmup

BODY = json.dumps({"messages": [{"role": "user", "content": "Good morning."}]})


def fifo(path: Path) -> None:
    os.mkfifo(path)


def long(path: Path) -> None:
    path.write_text(BODY + " " * MAX_BYTES)


def garbage(path: Path) -> None:
    path.write_text("{ torn, secret")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (fifo, "it is no regular file"),
        (Path.mkdir, "Is a directory"),
        (long, "it is larger than 1 MiB"),
        (garbage, "JSON"),
        (lambda _: None, "No such file"),
    ],
    ids=["fifo", "directory", "long", "garbage", "missing"],
)
def test_what_cannot_be_used_is_passed_over_and_named(
    make: Callable[[Path], None], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    make(bad)
    good.write_text(BODY)
    warmup = Warmup([str(bad), str(good)])
    with caplog.at_level(logging.WARNING):
        assert warmup.next() is not None
    assert warmup.notes()[0] == "warmup: 1 of 2 prompts are done"
    assert warmup.notes()[1].startswith(f"warmup: {bad}: ")
    assert why in warmup.notes()[1]
    assert caplog.messages == warmup.notes()[1:]
    assert "secret" not in caplog.text
    warmup.done()
    assert warmup.next() is None
