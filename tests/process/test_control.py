"""The control socket: bad clients, many clients, long paths, nobody there."""

import socket
import threading
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from support.supervised import Launched

from mlx_launcher.errors import LaunchError
from mlx_launcher.supervisor import control

Launch = Callable[..., Launched]


@pytest.fixture
def launched(launch: Launch) -> Launched:
    started = launch()
    started.until_state("ready")
    return started


@pytest.mark.parametrize("timeout_s", ["5", -1, True, None, [], float("nan"), float("inf")])
def test_stop_with_a_strange_timeout_is_refused(launched: Launched, timeout_s: object) -> None:
    answer = control.call(str(launched.instance), {"do": "stop", "timeout_s": timeout_s})
    assert answer["error"]["code"] == "bad_request"
    assert launched.status()["state"] == "ready"


def test_a_status_names_the_configuration(launch: Launch) -> None:
    source = {"argv": ["python", "--config=/etc/mine.json", "plan"], "cwd": "/", "env": {}}
    assert launch(source=source).status()["config"] == "/etc/mine.json"


def test_many_honest_clients_at_once(launched: Launched) -> None:
    states: list[str] = []
    threads = [threading.Thread(target=lambda: states.append(launched.status()["state"])) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == ["ready"] * 30


def test_nobody_there(tmp_path: Path) -> None:
    for instance in (tmp_path / "missing", tmp_path):
        with pytest.raises(control.NotRunning) as caught:
            control.call(str(instance), {"do": "status"})
        assert (caught.value.code, caught.value.exit_code) == ("not_running", 3)


def test_a_socket_file_left_over_is_nobody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, chdir(tmp_path):
        sock.bind("control.sock")
    with pytest.raises(control.NotRunning):
        control.call(str(tmp_path), {"do": "status"})


def test_a_supervisor_that_does_not_answer_is_not_called_absent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        with chdir(tmp_path):
            sock.bind("control.sock")
        sock.listen()
        with pytest.raises(LaunchError) as caught:
            control.call(str(tmp_path), {"do": "status"}, timeout_s=0.2)
    assert caught.value.code == "no_answer"
