"""The API key: demanded beyond loopback, and seen by nobody."""

import json

import psutil
from support.launched import Launcher, http_request

KEY = "sk-planted-in-a-test"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_key_is_in_no_command_line_no_environment_and_no_file(launcher: Launcher) -> None:
    done = launcher.command("start", "--demo", "--port", str(launcher.port), MLX_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert http_request(launcher.port, "/v1/chat/completions", HELLO).status == 200
    processes = launcher.processes()
    assert len(processes) == 2
    for process in processes:
        assert KEY not in json.dumps([process.cmdline(), process.environ()])
    files = [path for path in launcher.state_dir.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert {path.stat().st_mode & 0o077 for path in [launcher.state_dir, *launcher.state_dir.rglob("*")]} == {0}
    assert psutil.Process(launcher.server_pid()).is_running()


def test_an_address_that_others_reach_wants_a_key_and_then_demands_it(launcher: Launcher) -> None:
    beyond = ("start", "--demo", "--port", str(launcher.port), "--host", "0.0.0.0")
    refused = launcher.command(*beyond)
    assert refused.returncode == 1
    assert "MLX_API_KEY" in refused.stderr
    assert launcher.command(*beyond, MLX_API_KEY=KEY).returncode == 0
    assert http_request(launcher.port, "/v1/chat/completions", HELLO).status == 401
    assert http_request(launcher.port, "/health").status == 200
