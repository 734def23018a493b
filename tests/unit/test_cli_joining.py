"""`run --with-caller` where a server runs on the port already."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pretended import a_status

from mlx_launcher.cli import joining, run
from mlx_launcher.errors import EXIT_NOT_RUNNING, LaunchError

READY = a_status(8081, "/m")
ENDING = {**READY, "draining": True}
LOADING = {**READY, "state": "restarting", "phase": "loading"}
RELOADED = {**READY, "reload": {"id": 1, "state": "done"}}


class Waiting:
    """A caller that stays."""

    def gone(self) -> bool:
        return False


def answers(monkeypatch: pytest.MonkeyPatch, module: Any, *statuses: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the supervisor says, look by look; then it is gone. What comes back is what nobody has looked at yet."""
    left: Iterator[dict[str, Any]] = iter(statuses)

    def ask(*_: object) -> dict[str, Any]:
        for status in left:
            return status
        raise LaunchError("not_running", "nothing is running", "", EXIT_NOT_RUNNING)

    monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return left


def test_it_stays_through_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = answers(monkeypatch, joining, READY, ENDING, LOADING, RELOADED, {**RELOADED, "draining": True})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(joining, "Caller", Waiting)
    with pytest.raises(LaunchError, match="on port 8081 was stopped") as ended:
        joining.join(tmp_path / "8081", READY, "/m")
    assert (ended.value.code, list(left)) == ("stopped", [])
    assert capsys.readouterr().out.splitlines() == [
        "mlx-launch: a server runs on port 8081 already; using it",
        "Application startup complete: http://127.0.0.1:8081/v1",
    ]


def test_a_server_that_ends_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = {"instance": str(tmp_path)}
    answers(monkeypatch, run, ENDING, LOADING)
    assert run._running(plan) == LOADING
    answers(monkeypatch, run, {**RELOADED, "draining": True})
    assert run._running(plan) is None
