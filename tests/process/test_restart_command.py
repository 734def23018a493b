"""`mlx-launch restart`, with a real supervisor and a fake server: what it shows, and how it ends."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.supervised import Launched, fake_host
from support.waiting import until

from mlx_launcher.cli import main, restart

Launch = Callable[..., Launched]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(launched: Launched, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["--state-dir", str(launched.instance.parent), *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return command


@pytest.fixture
def launched(launch: Launch, instance: Path) -> Launched:
    # The plan takes longer than a look of the command, so that planning is seen.
    argv = ["sh", "-c", 'sleep 0.3; cat "$0" && exit "$(cat "$0.exit")"', f"{instance}.next"]
    started = launch(
        "--fault-if",
        str(instance.parent / "broken"),
        source={"argv": argv, "cwd": "/", "env": {"PATH": os.environ["PATH"]}},
    )
    started.until_state("ready")
    return started


def test_what_happens_is_shown(launched: Launched, run: Run) -> None:
    launched.plan_next(backend=fake_host("--loading-s", "0.5"), stop_timeout_s=9.0)
    client = threading.Thread(target=launched.provoke, args=("/slow",))
    client.start()
    until(lambda: launched.status()["activity"]["in_flight"] == 1)
    code, out, err = run("restart")
    client.join()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if line in ("planning", "stopping", "loading")] == [
        "planning",
        "stopping",
        "loading",
    ]
    assert lines[-3:] == [
        "  backend.argv changed",
        "  stopTimeout 5 → 9",
        f"Restarted. Ready at {launched.plan['url']}.",
    ]
    assert launched.status()["state"] == "ready"


def test_without_a_change_it_is_restarted_all_the_same(launched: Launched, run: Run) -> None:
    launched.plan_next()
    code, out, _ = run("restart")
    assert code == 0
    assert "no change in the configuration" in out
    assert len(launched.server_pids()) == 2


def test_refused_says_why_what_to_do_and_that_nothing_was_stopped(launched: Launched, run: Run) -> None:
    launched.refuse_next("rc.json backends.mlx.port: it is a text", "Write it without quotes", 4)
    code, _, err = run("restart")
    assert code == 4
    said = "mlx-launch: rc.json backends.mlx.port: it is a text; nothing was stopped. Write it without quotes.\n"
    assert err == said
    assert len(launched.server_pids()) == 1
    assert "refused: rc.json backends.mlx.port" in run("status")[1]
    envelope = json.loads(run("restart", "--json")[1])
    assert (envelope["ok"], envelope["errors"][0]["code"]) == (False, "refused")
    assert envelope["data"]["reload"]["exit"] == 4


def test_reverted_says_why_and_that_the_last_one_serves(launched: Launched, run: Run) -> None:
    launched.plan_next(backend=fake_host("--fault", "The weights are torn."))
    code, out, err = run("restart")
    assert code == 1
    assert "  backend.argv changed" in out
    assert "did not come up: The weights are torn. Look at it; the last one that worked serves again" in err
    assert err.count("\n") == 1
    assert launched.status()["state"] == "ready"
    assert launched.get() == str(launched.server_pids()[-1])


def test_reverted_to_the_fallback_names_it(launched: Launched, run: Run) -> None:
    fallback = {**fake_host(), "name": "mlx-legacy"}
    launched.plan_next(fallback=fallback)
    assert run("restart")[0] == 0
    (launched.instance.parent / "broken").touch()
    launched.provoke("/kill")
    launched.until_state("degraded")
    code, _, err = run("restart")
    assert code == 1
    assert "mlx did not come up: broken later. Look at it; mlx-legacy serves again" in err
    assert launched.status()["state"] == "degraded"


def test_a_supervisor_that_is_killed_meanwhile(launched: Launched, run: Run) -> None:
    launched.plan_next(backend=fake_host("--loading-s", "30"))

    def kill() -> None:
        until(lambda: launched.status()["phase"] == "loading")
        launched.process.kill()
        launched.process.wait()

    killing = threading.Thread(target=kill)
    killing.start()
    code, _, err = run("restart")
    killing.join()
    assert code == 1
    assert "was killed" in err
    assert err.count("\n") == 1


def test_when_the_last_known_good_fails_too_it_is_failed(launched: Launched, run: Run, instance: Path) -> None:
    (instance.parent / "broken").touch()
    launched.plan_next(backend=fake_host("--fault", "The weights are torn."))
    code, out, err = run("restart")
    assert code == 1
    assert ": failed\n" in out
    assert "broken later" in err
    assert "The weights are torn" in err


def test_stopped_while_it_restarts(launched: Launched, run: Run) -> None:
    launched.plan_next(backend=fake_host("--loading-s", "30"))

    def stop() -> None:
        until(lambda: launched.status()["phase"] == "loading")
        launched.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    code, _, err = run("restart")
    stopping.join()
    assert code == 1
    assert "was stopped while it restarted" in err


def test_busy_is_told(launched: Launched, run: Run) -> None:
    launched.plan_next(backend=fake_host("--loading-s", "30"))
    launched.process.send_signal(signal.SIGHUP)
    until(lambda: launched.status()["reload"])
    code, _, err = run("restart")
    assert code == 1
    assert "under way already" in err


def test_ctrl_c_leaves_it_restarting(launched: Launched, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restart, "phase_text", interrupt)
    launched.plan_next(backend=fake_host("--loading-s", "1"))
    code, _, err = run("restart")
    assert code == 130
    assert "goes on restarting" in err
    assert launched.until_reloaded(1)["state"] == "done"


def test_nothing_runs(launched: Launched, run: Run) -> None:
    launched.stop()
    assert run("restart")[0] == 3
