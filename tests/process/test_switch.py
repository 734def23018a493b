"""`{"do": "switch"}`: from one backend of a plan to the other, on the same sockets."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
from support.launched import Crowd
from support.supervised import Launched, fake_host, running
from support.waiting import until

from mlx_launcher.supervisor import control, loop
from mlx_launcher.supervisor.journal import Journal
from mlx_launcher.supervisor.listener import Port
from mlx_launcher.supervisor.terminal import Terminal

Launch = Callable[..., Launched]


def fallback(*arguments: str) -> dict[str, Any]:
    return {**fake_host(*arguments), "name": "mlx-legacy"}


def ask(launched: Launched, to: object, reason: object = "it is slow") -> dict[str, Any]:
    return control.call(str(launched.instance), {"do": "switch", "to": to, "reason": reason, "automatic": False})


def _is_a_pid(text: str) -> None:
    assert text.isdigit()


def switch(launched: Launched, to: str) -> dict[str, Any]:
    return launched.until_reloaded(ask(launched, to)["data"]["reload_id"])


def test_there_and_back_without_a_refusal(launch: Launch) -> None:
    launched = launch(fallback=fallback())
    first = launched.until_state("ready")["server"]["pid"]
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=4) as crowd:
        reload = switch(launched, "fallback")
        assert (reload["state"], reload["trigger"], reload["reason"]) == ("done", "rollback", None)
        status = launched.status()
        assert (status["state"], status["backend"], status["configured_backend"]) == ("degraded", "mlx-legacy", "mlx")
        rollback = status["rollback"]
        assert (rollback["from"], rollback["to"], rollback["reason"]) == ("mlx", "mlx-legacy", "it is slow")
        assert rollback["automatic"] is False
        assert not running(first)
        assert switch(launched, "configured")["state"] == "done"
        status = launched.status()
        assert (status["state"], status["backend"], status["rollback"]) == ("ready", "mlx", None)
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 10)
    assert (crowd.refused, crowd.errors) == ([], [])


@pytest.mark.parametrize("to", ["fallback", "configured"])
def test_what_does_not_prove_itself_brings_the_old_one_back(launch: Launch, to: str, tmp_path: Any) -> None:
    broken = tmp_path / "broken"
    breakable = ["--fault-if", str(broken)]
    launched = launch(
        *(breakable if to == "configured" else []), fallback=fallback(*(breakable if to == "fallback" else []))
    )
    launched.until_state("ready")
    if to == "configured":
        assert switch(launched, "fallback")["state"] == "done"
    before = launched.status()
    broken.touch()
    with Crowd(lambda _: _is_a_pid(launched.get()), clients=2) as crowd:
        reload = switch(launched, to)
        status = launched.until_state(before["state"])
    assert (reload["state"], reload["reason"]) == ("reverted", "broken later. Look at it")
    assert crowd.refused == []
    assert (status["backend"], status["rollback"]) == (before["backend"], before["rollback"])


def test_refused_where_there_is_no_fallback(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    answer = ask(launched, "fallback")
    assert (answer["ok"], answer["error"]["code"]) == (False, "no_fallback")
    assert "fallback" in answer["error"]["hint"]
    assert launched.status()["reload"] is None


@pytest.mark.parametrize(("to", "reason"), [("mlx", "why"), (None, "why"), ("fallback", None), (["fallback"], "why")])
def test_a_request_that_is_none_is_refused(launch: Launch, to: object, reason: object) -> None:
    launched = launch(fallback=fallback())
    launched.until_state("ready")
    assert ask(launched, to, reason)["error"]["code"] == "bad_request"


def test_to_where_it_is_already_is_done_at_once(launch: Launch) -> None:
    launched = launch("--fault", "The weights are torn.", fallback=fallback())
    before = launched.until_state("degraded")
    assert switch(launched, "fallback")["state"] == "done"
    status = launched.status()
    assert status["server"]["pid"] == before["server"]["pid"]
    assert status["rollback"] == before["rollback"]


def test_one_change_at_a_time_and_none_while_it_stops(launch: Launch) -> None:
    launched = launch("--loading-s", "5", fallback=fallback("--loading-s", "1"))
    number = ask(launched, "fallback")["data"]["reload_id"]  # while the configured one still starts
    assert ask(launched, "configured")["error"]["code"] == "busy"
    assert launched.until_reloaded(number)["state"] == "done"
    assert launched.status()["state"] == "degraded"
    ask(launched, "configured")
    assert launched.stop() == 0
    assert launched.state_file()["status"]["reload"]["state"] == "refused"


def test_a_fallback_that_serves_is_mentioned_once_an_hour(
    launch: Launch, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: the loop's own time is moved."""
    launched = launch("--fault", "The weights are torn.", fallback=fallback())
    launched.until_state("degraded")
    assert launched.stop() == 0  # only its plan and its directory are wanted
    monkeypatch.chdir(launched.instance)
    wake, feed = socket.socketpair()
    plan: Any = launched.plan
    supervisor = loop.Supervisor(plan, Port([], port, print), Journal("journal.jsonl"), wake, Terminal(False))
    supervisor._policy.on_fallback = True
    supervisor._policy.state = "degraded"
    supervisor._changes.rolled_back("The weights are torn", automatic=True)
    for minute in range(150):
        supervisor._now = minute * 60.0
        supervisor._changes.remind(supervisor._now, True, supervisor._status)
    said = [line["reason"] for line in launched.journal() if line["event"] == "degraded"]
    assert said == ["on mlx-legacy instead of mlx: The weights are torn"] * 2
    log = (launched.instance / "server.log").read_text()
    assert log.count("mlx-launch: degraded, on mlx-legacy instead of mlx: The weights are torn\n") == 2
    wake.close()
    feed.close()
