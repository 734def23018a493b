"""What is killed, and what a client sees of it."""

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
from support.launched import Crowd, Launcher, Reply, chat, http_request
from support.waiting import until

from mlx_launcher.demo import build_random

PROMPT = "word " * 60


def test_a_killed_server_is_replaced_without_a_refusal_and_its_cache_is_still_there(
    launcher: Launcher, random_model: Path
) -> None:
    launcher.start("--model", str(random_model))
    expected = chat(launcher.port, PROMPT, max_tokens=4)
    assert expected.cached == 0
    before = launcher.server_pid()

    # Every client has a connection of its own for each request, so that a refusal would show.
    with Crowd(lambda _: _expect(http_request(launcher.port, "/v1/models")), clients=4) as crowd:
        until(lambda: crowd.answered > 20)
        os.kill(before, signal.SIGKILL)
        after = chat(launcher.port, PROMPT, max_tokens=4)
        answered = crowd.answered
        until(lambda: crowd.answered > answered + 20)
    assert crowd.refused == []
    # Only what was being answered when it died may have failed.
    assert len(crowd.errors) <= 4

    assert after.text == expected.text
    assert after.cached == expected.json["usage"]["prompt_tokens"] - 1
    status = launcher.status()
    assert (status["state"], status["server"]["restarts"]) == ("ready", 1)
    assert status["server"]["last_exit"]["signal"] == "SIGKILL"
    assert status["server"]["pid"] != before


def _expect(reply: Reply) -> None:
    assert reply.status == 200


def test_a_killed_supervisor_takes_its_server_with_it_and_start_works_at_once(launcher: Launcher) -> None:
    launcher.start("--demo")
    status = launcher.status()
    os.kill(status["supervisor"]["pid"], signal.SIGKILL)
    launcher.start("--demo")
    assert chat(launcher.port, "Hi").status == 200
    until(lambda: not psutil.pid_exists(status["server"]["pid"]), 5, "the end of the old server")
    assert launcher.status()["server"]["pid"] != status["server"]["pid"]


def test_a_server_whose_supervisor_was_killed_goes_by_itself(launcher: Launcher) -> None:
    launcher.start("--demo")
    os.kill(launcher.status()["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: launcher.processes() == [], 5, "the end of all processes")
    done = launcher.command("status")
    assert done.returncode == 3


def test_stop_leaves_no_process_and_no_port(launcher: Launcher) -> None:
    launcher.start("--demo")
    assert len(launcher.processes()) == 2
    done = launcher.command("stop")
    assert done.returncode == 0, done.stderr
    assert launcher.processes() == []
    assert launcher.command("status").returncode == 3
    launcher.start("--demo")


def test_a_stop_lets_the_answer_in_flight_finish(launcher: Launcher, random_model: Path) -> None:
    launcher.start("--model", str(random_model))
    with Crowd(lambda _: _expect(chat(launcher.port, PROMPT, max_tokens=200)), clients=1) as crowd:
        until(lambda: launcher.status()["activity"]["in_flight"] == 1)
        assert launcher.command("stop").returncode == 0
    # It was answered whole; the port was closed only to what came after.
    assert (crowd.answered, crowd.errors) == (1, [])
    assert crowd.refused


def test_a_model_that_is_torn_is_named_and_nothing_is_left_running(launcher: Launcher, tmp_path: Path) -> None:
    model = build_random(tmp_path / "models" / "torn")
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = launcher.command("start", "--model", str(model), "--port", str(launcher.port))
    assert done.returncode == 1
    assert "torn" in done.stderr
    assert weights.name in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    until(lambda: launcher.processes() == [], 5, "the end of all processes")


def test_an_unknown_architecture_is_named(launcher: Launcher, tmp_path: Path) -> None:
    model = build_random(tmp_path / "models" / "unknown")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "tomorrow"}))
    done = launcher.command("start", "--model", str(model), "--port", str(launcher.port))
    assert done.returncode == 1
    assert "tomorrow" in done.stderr


def test_every_plain_family_is_served(launcher: Launcher, tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        model = build_random(tmp_path / "models with a space" / family, family)
        launcher.start("--model", str(model))
        first, again = (chat(launcher.port, PROMPT, max_tokens=4) for _ in range(2))
        assert again.text == first.text
        assert again.cached == first.json["usage"]["prompt_tokens"] - 1
        assert launcher.command("stop").returncode == 0


def test_a_copy_of_the_model_beside_a_broken_one_starts(launcher: Launcher, tmp_path: Path, random_model: Path) -> None:
    model = Path(shutil.copytree(random_model, tmp_path / "model"))
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused = launcher.command("start", "--model", str(model), "--port", str(launcher.port))
    assert refused.returncode == 1
    assert "tokenizer.json" in refused.stderr
    (tmp_path / "tokenizer.json").rename(model / "tokenizer.json")
    launcher.start("--model", str(model))
