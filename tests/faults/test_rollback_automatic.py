"""Rows 58 and 59 of the list of faults: the fallback takes over on the same sockets, or the end is told with both reasons."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launched import Crowd
from support.supervised import Launched, fake_host, fake_script, running
from support.waiting import until

from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


def fallback(*arguments: str) -> dict[str, Any]:
    return {**fake_host(*arguments), "name": "mlx-legacy"}


def _is_a_pid(text: str) -> None:
    assert text.isdigit()


def test_58_a_crash_loop_ends_on_the_fallback_at_the_same_url_while_clients_ask(launch: Launch) -> None:
    launched = launch("--die-after", "0.3", fallback=fallback(), restart={"max_restarts": 2})
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=4) as crowd:
        status = launched.until_state("degraded", 20)
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 20)
    assert crowd.refused == []
    assert len(crowd.errors) <= 3 * 4  # no more than was in flight at each of the three deaths
    reason = "3 crashes within 60 s of service, the last one: the server exited with code 3"
    assert (status["backend"], status["configured_backend"], status["url"]) == (
        "mlx-legacy",
        "mlx",
        launched.plan["url"],
    )
    rollback = status["rollback"]
    assert (rollback["from"], rollback["to"], rollback["automatic"]) == ("mlx", "mlx-legacy", True)
    assert rollback["reason"] == reason
    assert rollback["at"].endswith("Z")
    assert status["last_error"] is None
    assert status["model"] == launched.plan["model"]
    assert [line["reason"] for line in launched.journal() if line["event"] == "rollback"] == [reason]
    assert [line["backend"] for line in launched.journal() if line["event"] == "spawn"] == ["mlx"] * 3 + ["mlx-legacy"]
    assert launched.get() == str(status["server"]["pid"])


@pytest.mark.parametrize(
    ("arguments", "changes", "reason"),
    [
        (["--fault", "The weights are torn."], {}, "The weights are torn. Look at it"),
        (["--die", "importing"], {}, "4 crashes within 60 s of service"),
        ([], {"backend": {**fake_host(), "argv": ["/nowhere/python"]}}, "/nowhere/python"),
        (["--loading-s", "9", "--silent"], {"hang_timeout_s": 0.2}, "no progress for 0.2 s (hangTimeout)"),
    ],
)
def test_58_what_never_becomes_ready_goes_to_the_fallback(
    launch: Launch, arguments: list[str], changes: dict[str, Any], reason: str
) -> None:
    launched = launch(*arguments, fallback=fallback(), **changes)
    status = launched.until_state("degraded", 20)
    assert reason in status["rollback"]["reason"]


def test_58_the_fallback_is_supervised_like_any_other(launch: Launch) -> None:
    launched = launch("--fault", "The weights are torn.", fallback=fallback())
    pid = launched.until_state("degraded")["server"]["pid"]
    os.kill(pid, signal.SIGKILL)
    launched.until_restarts(1)
    status = launched.until_state("degraded")
    assert status["rollback"]["reason"] == "The weights are torn. Look at it"
    assert status["server"]["last_exit"]["signal"] == "SIGKILL"


def test_58_from_a_script_to_a_host_and_the_port_is_never_left(launch: Launch, port: int) -> None:
    launched = launch(backend=fake_script(port, "--exit", "7"), fallback=fallback(), restart={"max_restarts": 1})
    status = launched.until_state("degraded")
    assert (status["listener"], status["backend"]) == ("owned", "mlx-legacy")
    assert launched.get() == str(status["server"]["pid"])


def test_58_restart_tries_the_configured_backend_again(launch: Launch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    launched = launch("--fault-if", str(broken), fallback=fallback())
    launched.until_state("degraded")
    launched.plan_next()
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=2) as crowd:
        reload = launched.restart()
        assert (reload["state"], reload["reason"]) == ("reverted", "broken later. Look at it")
        status = launched.until_state("degraded")
        assert status["rollback"]["reason"] == "broken later. Look at it"
        broken.unlink()
        assert launched.restart()["state"] == "done"
    assert crowd.refused == []
    status = launched.until_state("ready")
    assert (status["backend"], status["rollback"]) == ("mlx", None)


def test_59_the_fallback_fails_too_and_both_reasons_are_told(launch: Launch) -> None:
    launched = launch("--fault", "The weights are torn.", fallback=fallback("--die", "loading"))
    assert launched.process.wait(15) == 1
    status = launched.state_file()["status"]
    assert status["state"] == "failed"
    assert status["last_error"] == (
        "the fallback failed: 4 crashes within 60 s of service, the last one: the server was ended by SIGKILL. "
        "It ran because of this: The weights are torn. Look at it"
    )
    assert launched.refuses()
    assert not any(running(pid) for pid in launched.server_pids())
    with pytest.raises(control.NotRunning):
        launched.status()
