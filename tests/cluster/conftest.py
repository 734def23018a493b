"""`make test-cluster`: minutes on two cores, and so no part of `make test`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clusters import TABLE, Cluster

from mlx_launcher.demo import build_random


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only who names this directory means it."""
    return None if any("cluster" in argument for argument in config.args) else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("what failed, and how soon it was named")
        for fault, took_s, said in TABLE:
            terminalreporter.write_line(f"{took_s:5.1f} s  {fault:<44} {said}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(models: Path) -> Path:
    """Splits into two by tensor: it has two heads of keys and values."""
    return build_random(models / "llama")


@pytest.fixture(scope="session")
def qwen2(models: Path) -> Path:
    """Splits into four by pipeline: it has four layers."""
    return build_random(models / "qwen2", "qwen2")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes and starts a cluster; `cluster(model, {"peers": …}, namespace, **block)`. Ends what the test leaves."""
    made: list[Cluster] = []

    def start(model: Path, distributed: dict[str, Any], namespace: str = "", **block: Any) -> Cluster:
        made.append(Cluster(tmp_path, model, distributed, namespace, **block))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.clean_up()
