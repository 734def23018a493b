"""Rows 1, 2, 5, 6, 8, 9 and 14 of the list of faults, with the real command and server; test_liveness.py has the others."""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.launched import Launcher, Reply, chat, http_request
from support.supervised import running
from support.waiting import until

from mlx_launcher.demo import build_random

HANG_S, FREEZE_S = 4.0, 2.0


class Served:
    """A server with short timeouts and a large budget of restarts, for all tests of this file."""

    def __init__(self, launcher: Launcher, directory: Path) -> None:
        self.launcher = launcher
        self.port = launcher.port
        block = {
            "port": launcher.port,
            "modelPath": str(build_random(directory / "random")),
            "fallback": None,
            "hangTimeout": f"{HANG_S:g}s",
            "freezeTimeout": f"{FREEZE_S:g}s",
            "stopTimeout": "1s",
            "restart": {"maxRestarts": 100, "backoff": "10ms", "backoffMax": "10ms"},
            "cache": {"enable_cache": False},
        }
        file = directory / "rc.json"
        file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": block}}))
        done = launcher.command("--config", str(file), "start")
        assert done.returncode == 0, done.stderr
        self.expected = chat(self.port, "Hello", max_tokens=4).text

    def status(self) -> dict[str, Any]:
        from mlx_launcher.supervisor import control

        answer = control.call(str(self.launcher.state_dir / str(self.port)), {"do": "status"})
        return dict(answer["data"])

    def busy(self) -> int:
        """The server's pid, once it works."""
        until(lambda: self.status()["activity"]["in_flight"] == 1)
        return int(self.status()["server"]["pid"])

    def answers_after(self, pid: int) -> dict[str, Any]:
        """Waits for the successor, which must answer as its predecessor did; the status then."""
        assert chat(self.port, "Hello", max_tokens=4).text == self.expected
        status = self.status()
        assert (status["state"], status["server"]["pid"] != pid) == ("ready", True)
        assert not running(pid)
        return status


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    launcher = Launcher(tmp_path_factory.mktemp("server") / "state")
    try:
        yield Served(launcher, tmp_path_factory.mktemp("random"))
    finally:
        launcher.clean_up()


class Asking(threading.Thread):
    """One request on a thread; `answer` is what came of it, an exception where nothing did."""

    def __init__(self, port: int, content: str, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.answer: Reply | Exception | None = None
        self._ask = (port, content, fields)
        self.start()

    def run(self) -> None:
        port, content, fields = self._ask
        try:
            self.answer = chat(port, content, **fields)
        except (OSError, http.client.HTTPException) as error:
            self.answer = error

    def ended(self) -> Reply | Exception | None:
        self.join(60)
        assert not self.is_alive(), "a client still waits"
        return self.answer


def test_01_killed_while_idle_is_respawned_and_nobody_is_refused(served: Served) -> None:
    pid = served.status()["server"]["pid"]
    os.kill(pid, signal.SIGKILL)
    status = served.answers_after(pid)
    assert status["server"]["last_exit"]["signal"] == "SIGKILL"


def test_02_killed_while_it_imports(served: Served) -> None:
    pid = served.status()["server"]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: served.status()["phase"] == "importing")
    second = served.status()["server"]["pid"]
    assert second != pid
    os.kill(second, signal.SIGKILL)
    served.answers_after(second)


def test_05_killed_during_prefill_fails_that_request_and_the_next_one_works(served: Served) -> None:
    asking = Asking(served.port, "word " * 3000, max_tokens=4)
    pid = served.busy()
    os.kill(pid, signal.SIGKILL)
    assert isinstance(asking.ended(), Exception)
    served.answers_after(pid)


def test_06_killed_in_the_middle_of_a_stream_ends_it(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.read(200)
    pid = served.busy()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        response.read()
    connection.close()
    served.answers_after(pid)


def test_08_stopped_while_idle_is_replaced(served: Served) -> None:
    pid = served.status()["server"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    # Whoever connects meanwhile waits for the successor.
    status = served.answers_after(pid)
    assert "freezeTimeout" in status["server"]["last_exit"]["reason"]


def test_09_stopped_at_work_and_those_who_wait_are_answered_by_the_successor(served: Served) -> None:
    lost = Asking(served.port, "Hi", max_tokens=4000)
    pid = served.busy()
    os.kill(pid, signal.SIGSTOP)
    waiting = [Asking(served.port, "Hello", max_tokens=4) for _ in range(4)]
    for asking in waiting:
        answer = asking.ended()
        assert isinstance(answer, Reply), answer
        assert (answer.status, answer.text) == (200, served.expected)
    assert isinstance(lost.ended(), Exception)
    served.answers_after(pid)


def test_14_a_long_prompt_with_a_long_answer_is_left_alone(served: Served) -> None:
    """How long depends on the machine, a minute on a busy one; what takes longer than any timeout for certain is a fake."""
    pid = served.status()["server"]["pid"]
    asking = Asking(served.port, "word " * 1000, max_tokens=1000)
    until(lambda: served.status()["activity"]["in_flight"] == 1)
    while asking.is_alive():
        assert http_request(served.port, "/health").status == 200
        time.sleep(0.1)
    answer = asking.ended()
    assert isinstance(answer, Reply), served.status()["server"]
    assert (answer.status, answer.json["usage"]["completion_tokens"] > 0) == (200, True)
    assert served.status()["server"]["pid"] == pid
