from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launched import Launcher

from mlx_launcher.demo import build_random


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """A launcher with nothing running."""
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The demo model, served for all tests of a file."""
    launcher = Launcher(tmp_path_factory.mktemp("demo") / "state")
    launcher.start("--demo")
    yield launcher
    launcher.clean_up()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers depend on the whole prompt."""
    return build_random(tmp_path_factory.mktemp("models") / "random")
