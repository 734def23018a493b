"""What SECURITY.md promises, on the whole product: web pages, the key, other users, links, and what is left on the disk."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.hosts import Host
from support.launched import Launcher, Reply, chat, http_request, stream_events
from support.tools import TOOLS
from support.waiting import free_port, until

from mlx_launcher.demo import GREETING, build_demo
from mlx_launcher.supervisor import control

NOBODY = 65534
KEY = "sk-planted-4711-in-a-test"
PLANTED = "Xylophone-4711 plays in the attic"
CHAT = "/v1/chat/completions"
BACKENDS = ["mlx", "mlx-legacy"]


@pytest.fixture(params=BACKENDS)
def served(request: pytest.FixtureRequest, launcher: Launcher) -> Launcher:
    launcher.start("--demo", f"--mode={request.param}")
    return launcher


def asked(port: int, method: str, path: str, headers: dict[str, str]) -> Reply:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode() if method == "POST" else None
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def test_a_foreign_origin_or_host_is_refused_on_every_path_and_generates_nothing(served: Launcher) -> None:
    own = f"http://127.0.0.1:{served.port}"
    pages: list[dict[str, str]] = [
        {"Origin": "https://evil.example", "Content-Type": "text/plain"},
        {"Origin": f"http://localhost:{served.port}"},
        {"Origin": "null"},
        {"Host": f"evil.example:{served.port}"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ]
    ways = [("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/nowhere")]
    for headers in pages:
        for method, path in [*ways, ("OPTIONS", CHAT)]:
            preflight = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
            reply = asked(served.port, method, path, {**headers, **preflight})
            assert (reply.status, reply.json["error"]["code"][:8]) == (403, "foreign_"), (headers, method, path)
            assert set(reply.json["error"]) == {"message", "type", "param", "code"}
            assert [name for name in reply.headers if name.startswith("access-control")] == []
    assert asked(served.port, "OPTIONS", CHAT, {}).status == 405
    assert served.status()["activity"]["requests"] == 0
    for headers in ({}, {"Origin": own}, {"Host": f"localhost:{served.port}"}, {"Sec-Fetch-Mode": "cors"}):
        reply = asked(served.port, "POST", CHAT, headers)
        assert reply.text == GREETING
        assert [name for name in reply.headers if name.startswith("access-control")] == []


# -- the key


def write_config(directory: Path, port: int, **block: object) -> Path:
    file = directory / ".anyclauderc.json"
    model = {"modelPath": "demo", "port": port, "requireKey": True}
    file.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": {**model, **block}}}))
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("way", ["environment", "apiKey", "apiKeyFile"])
def test_a_planted_key_is_seen_by_nobody(launcher: Launcher, tmp_path: Path, way: str) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    (home / "key").write_text(f"{KEY}\n")
    (home / "key").chmod(0o600)
    keys: dict[str, str] = {"apiKey": KEY} if way == "apiKey" else {"apiKeyFile": "key"} if way == "apiKeyFile" else {}
    file = write_config(home, launcher.port, **keys)
    environment = {"HOME": str(home), "TMPDIR": str(temporary), "MLX_LAUNCH_CONFIG": str(file)}
    environment |= {"MLX_API_KEY": KEY} if way == "environment" else {}
    said: list[str] = []

    def command(*words: str, code: int = 0) -> None:
        done = launcher.command(*words, timeout_s=90.0, **environment)
        assert done.returncode in (0, code), done.stderr
        said.append(done.stdout + done.stderr)

    def nothing_tells(processes: int) -> None:
        running = launcher.processes()
        assert len(running) == processes
        for process in running:
            assert KEY not in json.dumps([process.cmdline(), process.environ()])
        assert found_in(tmp_path, KEY.encode()) <= {file, home / "key"}

    command("start", "--demo")
    right = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    refused = http_request(launcher.port, CHAT, body, headers={"Authorization": f"Bearer {KEY}x"})
    assert refused.status == 401
    said.append(refused.body.decode())
    assert http_request(launcher.port, CHAT, body, headers=right).status == 200
    nothing_tells(2)
    before = launcher.server_pid()
    os.kill(before, signal.SIGKILL)
    until(lambda: launcher.status()["state"] == "ready" and launcher.server_pid() != before)
    nothing_tells(2)
    command("restart")
    for words in (("status",), ("status", "--json"), ("config", "show", "--origin"), ("config", "validate"), ("logs",)):
        command(*words)
    command("logs", "--supervisor")
    command("doctor", code=1)
    command("doctor", "--json", code=1)
    nothing_tells(2)
    file.write_text(file.read_text().replace('"requireKey": true', '"requireKey": 7'))
    command("config", "validate", code=4)
    command("restart", code=4)
    command("stop")
    nothing_tells(0)
    assert [text for text in said if KEY in text] == []


def test_a_key_file_that_others_can_read_is_refused_before_anything_starts(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    file = write_config(tmp_path, launcher.port, apiKeyFile="key")
    done = launcher.command("--config", str(file), "start", "--demo")
    assert done.returncode == 4
    assert f"chmod 600 {tmp_path / 'key'}" in done.stderr
    assert KEY not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert launcher.processes() == []


# -- what is on the disk


def found_in(directory: Path, text: bytes) -> set[Path]:
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path for path in files if text in path.read_bytes()}


def converse(port: int) -> None:
    """Everything that a client may do with a text, well and badly."""
    assert chat(port, PLANTED).text == GREETING
    *chunks, done = stream_events(chat(port, PLANTED, stream=True).body)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == GREETING
    assert chat(port, PLANTED, tools=TOOLS).status == 200
    assert chat(port, PLANTED, tools=TOOLS, stream=True).status == 200
    assert http_request(port, "/v1/completions", {"prompt": PLANTED, "max_tokens": 4}).status == 200
    bad: list[Any] = [
        *[b'{"messages": "' + PLANTED.encode(), b"\xff" + PLANTED.encode(), {"messages": PLANTED}, [PLANTED]],
        *[
            {"messages": [{"role": PLANTED, "content": PLANTED}]},
            {"messages": [{"role": "user", "content": {PLANTED: 1}}]},
        ],
        *[
            {"messages": [{"role": "user", "content": PLANTED}], name: PLANTED}
            for name in ("tools", "seed", "stop", "n")
        ],
        {"messages": [{"role": "user", "content": PLANTED}], "guided_regex": f"({PLANTED}"},
        {"messages": [{"role": "user", "content": PLANTED}], "response_format": {"type": PLANTED}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PLANTED}}]}]},
        {"messages": [{"role": "user", "content": f"{PLANTED} " * 20_000}], "max_tokens": 1},
    ]
    for body in bad:
        assert http_request(port, CHAT, body).status in (200, 400, 422)
    assert http_request(port, f"/v1/models/{PLANTED.replace(' ', '%20')}").status == 404
    assert http_request(port, f"/{PLANTED.replace(' ', '%20')}?q={PLANTED.replace(' ', '%20')}").status == 404
    # A client that leaves in the middle.
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        body = {"messages": [{"role": "user", "content": PLANTED}], "stream": True, "n": 1, "max_tokens": 500}
        connection.request("POST", CHAT, json.dumps(body))
        assert connection.getresponse().read(10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_prompt_and_no_answer_is_in_any_file_but_the_kv_cache(
    launcher: Launcher, tmp_path: Path, backend: str
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(temporary)}
    start = ("start", "--demo", f"--mode={backend}", "--port", str(launcher.port))
    assert launcher.command(*start, timeout_s=90.0, **places).returncode == 0
    converse(launcher.port)
    if sys.platform == "linux":
        assert psutil.Process(launcher.server_pid()).rlimit(psutil.RLIMIT_CORE)[0] == 0
    # The server dies with the prompt in its memory.
    before = launcher.server_pid()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", launcher.port, timeout=30)) as connection:
        body = {"messages": [{"role": "user", "content": f"{PLANTED} " * 2000}], "stream": True}
        connection.request("POST", CHAT, json.dumps(body))
        os.kill(before, signal.SIGABRT)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.getresponse().read()
    until(lambda: launcher.status()["state"] == "ready" and launcher.server_pid() != before)
    for words in (("status", "--json"), ("logs",), ("logs", "--supervisor"), ("doctor",)):
        assert PLANTED[:14] not in launcher.command(*words, timeout_s=90.0, **places).stdout
    assert launcher.command("stop", timeout_s=90.0, **places).returncode == 0
    assert "tokens" in launcher.log()
    outside = {path for path in found_in(tmp_path, PLANTED[:14].encode()) if "kvcache" not in path.parts}
    answers = {path for path in found_in(tmp_path, GREETING[10:40].encode()) if "models" not in path.parts}
    assert (outside, {path for path in answers if "kvcache" not in path.parts}) == (set(), set())


def test_all_that_is_kept_is_for_its_owner_alone(launcher: Launcher) -> None:
    launcher.start("--demo")
    for number in range(2):
        assert chat(launcher.port, f"{number} {PLANTED} " * 100).status == 200
    sock = launcher.state_dir / str(launcher.port) / "control.sock"
    assert stat.S_IMODE(sock.stat().st_mode) == 0o600
    launcher.command("stop")
    kept = list((launcher.state_dir / "kvcache").rglob("*.safetensors"))
    assert kept
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    for path in [launcher.state_dir, *launcher.state_dir.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_loose_state_directory_and_a_loose_log_are_mended_at_a_start(launcher: Launcher) -> None:
    instance = launcher.state_dir / str(launcher.port)
    instance.mkdir(parents=True)
    (instance / "server.log").write_text("old\n")
    (launcher.state_dir / "kvcache").mkdir()
    loose = (launcher.state_dir, instance, instance / "server.log", launcher.state_dir / "kvcache")
    for path in loose:
        path.chmod(0o777)
    launcher.start("--demo")
    for path in loose:
        assert path.stat().st_mode & 0o077 == 0, path


# -- links


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("precious")
    return file


def test_links_in_place_of_what_is_written_are_not_followed(launcher: Launcher, victim: Path) -> None:
    instance = launcher.state_dir / str(launcher.port)
    instance.mkdir(parents=True, mode=0o700)
    launcher.state_dir.chmod(0o700)
    for name in ("server.log", "journal.jsonl", ".state.json.new", "state.json", "control.sock"):
        (instance / name).symlink_to(victim)
    launcher.start("--demo")
    assert chat(launcher.port, "Hi").text == GREETING
    launcher.command("stop")
    assert victim.read_text() == "precious"


def test_a_link_in_place_of_the_lock_or_the_directory_is_a_refusal(launcher: Launcher, victim: Path) -> None:
    instance = launcher.state_dir / str(launcher.port)
    instance.mkdir(parents=True, mode=0o700)
    launcher.state_dir.chmod(0o700)
    (instance / "lock").symlink_to(victim)
    done = launcher.command("start", "--demo", "--port", str(launcher.port))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "lock in it is a link" in done.stderr
    (instance / "lock").unlink()
    instance.rmdir()
    (victim.parent / "theirs").mkdir()
    instance.symlink_to(victim.parent / "theirs")
    done = launcher.command("start", "--demo", "--port", str(launcher.port))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "is a link" in done.stderr
    assert victim.read_text() == "precious"
    assert list((victim.parent / "theirs").iterdir()) == []


# -- another user


def as_another_user(sock: Path, request: bytes) -> bytes:
    """What a client that runs as another user is answered. A fork, because that user may not reach our interpreter."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            client.settimeout(10)
            client.connect(str(sock))
            with contextlib.suppress(OSError):
                client.sendall(request)
            answer = client.recv(65536)
        os.write(write_end, answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as told:
        answer = told.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def reachable() -> Iterator[Launcher]:
    """A launcher whose state directory lies where other users get to."""
    directory = Path(tempfile.mkdtemp(prefix="mlx-launch-test-", dir="/tmp"))
    directory.chmod(0o755)
    launcher = Launcher(directory / "state")
    yield launcher
    launcher.clean_up()
    shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_users_client_is_turned_away_even_where_the_socket_is_open(reachable: Launcher) -> None:
    reachable.start("--demo")
    instance = reachable.state_dir / str(reachable.port)
    sock = instance / "control.sock"
    for path, mode in ((reachable.state_dir, 0o755), (instance, 0o755), (sock, 0o666)):
        path.chmod(mode)
    answer = as_another_user(sock, b'{"do": "stop", "timeout_s": 0}\n')
    assert json.loads(answer)["error"]["code"] == "not_yours"
    assert control.call(str(instance), {"do": "status"})["data"]["state"] == "ready"


# -- models


@pytest.mark.parametrize("backend", ["textgen", "legacy"])
@pytest.mark.parametrize("asked_for_by", ["model", "tokenizer", "template"])
def test_no_code_that_comes_with_a_model_is_run(tmp_path: Path, backend: str, asked_for_by: str) -> None:
    model = build_demo(tmp_path / "model")
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    name = "config.json" if asked_for_by == "model" else "tokenizer_config.json"
    config = json.loads((model / name).read_text())
    if asked_for_by == "model":
        config |= {
            "model_file": "theirs.py",
            "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.M"},
        }
    elif asked_for_by == "tokenizer":
        config |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    else:
        code = "().__class__.__base__.__subclasses__()"
        config["chat_template"] = (
            "{{ " + code + " }}{% for c in " + code + " %}{{ c.__init__.__globals__ }}{% endfor %}"
        )
        (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / name).write_text(json.dumps(config))
    host = Host(model, free_port(), tmp_path / "kvcache", backend=backend)
    try:
        until(lambda: host.ready or host.process.poll() is not None, 60, "an end of the start")
        said = host.log()
    finally:
        host.kill()
    assert not (tmp_path / "ran").exists(), said
    if asked_for_by == "template":
        assert not host.ready, said
