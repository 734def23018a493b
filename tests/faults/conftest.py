from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launched import Launcher
from support.supervised import instance, launch, port  # noqa: F401 (fixtures)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """The real command, with nothing running."""
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()
