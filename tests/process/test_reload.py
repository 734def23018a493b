"""The command that makes another plan, in the supervisor's selector but without its loop."""

import os
import selectors
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.supervised import make_plan
from support.waiting import until

from mlx_launcher.plan import Plan
from mlx_launcher.supervisor.changes import Changes
from mlx_launcher.supervisor.journal import Journal, RotatingFile
from mlx_launcher.supervisor.plans import check
from mlx_launcher.supervisor.policy import Decision
from mlx_launcher.supervisor.reload import Reload
from mlx_launcher.supervisor.terminal import Terminal


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


def source(script: str) -> Any:
    return {"argv": ["sh", "-c", script], "cwd": "/", "env": {"PATH": os.environ["PATH"]}}


def turns(selector: selectors.BaseSelector, there: Callable[[], bool]) -> None:
    """The loop, until something is there."""

    def turn() -> bool:
        for key, mask in selector.select(0.01):
            key.data(mask)
        return there()

    until(turn)


def test_a_stop_in_the_same_round_as_what_the_command_says(selector: selectors.BaseSelector) -> None:
    reload = Reload(1, "restart", lambda data: None)
    reload.plan(source("echo plan; echo words >&2; sleep 60"), selector)
    events = until(lambda: len(found := selector.select(0.01)) == 2 and found)
    reload.abandon()
    for key, mask in events:
        key.data(mask)
    assert not selector.get_map()


def test_what_the_command_says_goes_to_the_log_of_the_plan_in_force(
    selector: selectors.BaseSelector, tmp_path: Path
) -> None:
    def plan(name: str) -> Plan:
        waits = f'until [ -e "{tmp_path}/go" ]; do sleep 0.01; done; echo words >&2'
        return check(make_plan(tmp_path, 1, log_file=str(tmp_path / name), source=source(waits)))

    changes = Changes(plan("good"), Journal(str(tmp_path / "journal")), Terminal(wanted=False))
    changes.plan, changes.log = plan("bad"), RotatingFile(str(tmp_path / "bad"), 1000)
    changes.reload("restart", selector)
    # The bad one fails meanwhile, and the one before is in force again.
    changes.decided(Decision("revert", "it failed"))
    changes.take()
    (tmp_path / "go").touch()
    turns(selector, lambda: (tmp_path / "good").exists())
    changes.close()
    assert (tmp_path / "good").read_text() == "words\n"
    assert not (tmp_path / "bad").exists()
