"""Real supervisor processes with a fake host, in a directory of the test's own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.supervised import Launched, make_plan
from support.waiting import free_port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def instance(tmp_path: Path, port: int) -> Path:
    return tmp_path / "state" / str(port)


@pytest.fixture
def launch(instance: Path, port: int) -> Iterator[Callable[..., Launched]]:
    """Starts a supervisor: `launch("--host-argument", …, plan_key=value, foreground=…)`. Kills what the test leaves."""
    all_of_them: list[Launched] = []

    def start(*host_arguments: str, foreground: bool = False, report: bool = True, **changes: Any) -> Launched:
        plan = make_plan(Path(changes.pop("instance", instance)), changes.pop("port", port), *host_arguments, **changes)
        all_of_them.append(Launched(plan, foreground, report))
        return all_of_them[-1]

    yield start
    for launched in all_of_them:
        launched.clean_up()
