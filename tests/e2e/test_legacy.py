"""The legacy server, mlx-lm's own in our host: as a host alone, and as a user starts it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.families import PROMPTS, TOKENS, reference
from support.hosts import Host
from support.launched import Crowd, Launcher, chat, http_request, stream_events
from support.tools import TOOLS
from support.waiting import free_port, until

from mlx_launcher.demo import GREETING, build_demo, build_random

LONG = "It was a dark and stormy night. " * 400


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def demo(models: Path) -> Iterator[Host]:
    with Host(build_demo(models / "demo"), free_port(), models / "none", backend="legacy") as host:
        yield host


def random_host(models: Path, **settings: Any) -> Host:
    model = build_random(models / "llama")
    return Host(model, free_port(), models / "none", backend="legacy", settings=settings)


def without_textgen(directory: Path) -> str:
    """A PYTHONPATH on which mlx-textgen is not installed."""
    directory.mkdir()
    (directory / "mlx_textgen.py").write_text("raise ModuleNotFoundError(\"No module named 'mlx_textgen'\")\n")
    return str(directory)


def open_stream(port: int, **fields: Any) -> socket.socket:
    """A request on a socket of its own, whose first bytes have come."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 100000, **fields}
    raw = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
    )
    received = b""
    while b'"content"' not in received:
        received += sock.recv(65536)
    return sock


def rest_of(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.closing(sock):
        while data := sock.recv(65536):
            received += data
    return received


def test_phases_health_and_models(demo: Host) -> None:
    assert list(dict.fromkeys(demo.phases)) == ["importing", "loading", "proving"]
    health = http_request(demo.port, "/health")
    assert (health.status, health.json["model_loaded"]) == (200, True)
    assert [model["id"] for model in http_request(demo.port, "/v1/models").json["data"]] == ["m"]
    assert http_request(demo.port, "/v1/models/m").json["id"] == "m"
    assert http_request(demo.port, "/v1/models/other").status == 404
    assert http_request(demo.port, "/nowhere").json["error"]["type"] == "not_found_error"
    assert "nothing at /;" in http_request(demo.port, "/").json["error"]["message"]


def test_nothing_is_answered_before_a_token_is_proved(models: Path) -> None:
    host = Host(build_demo(models / "demo"), free_port(), models / "none", backend="legacy")
    answered: list[tuple[bool, bool]] = []

    def ask() -> None:
        loaded = http_request(host.port, "/health").json["model_loaded"]
        answered.append((loaded, "proving" in host.phases))

    asking = threading.Thread(target=ask)
    asking.start()
    with host:
        asking.join(30)
    assert answered == [(True, True)]


def test_the_openai_client_whole_and_streamed(demo: Host) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{demo.port}/v1", api_key="any", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model="whatever", messages=messages)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (GREETING, "stop")
    assert whole.model == "m"
    stream = client.chat.completions.create(
        model="m", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == GREETING
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert client.completions.create(model="m", prompt="a", max_tokens=2).usage is not None


def test_a_stream_is_framed_right(demo: Host) -> None:
    *events, last = stream_events(chat(demo.port, "Hi", stream=True).body)
    assert last == "[DONE]"
    assert events[0]["model"] == "m"


def test_a_call_that_is_none_is_left_out(demo: Host) -> None:
    # Where nothing constrains it, the demo model writes `{}` for a call.
    reply = chat(demo.port, "Hi", tools=TOOLS)
    choice = reply.json["choices"][0]
    assert (reply.status, choice["finish_reason"]) == (200, "stop")
    assert "tool_calls" not in choice["message"]
    *events, _ = stream_events(chat(demo.port, "Hi", tools=TOOLS, stream=True).body)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert chat(demo.port, "Hi", tools=TOOLS, tool_choice="none").text == GREETING


def test_a_conversation_with_calls_goes_on(demo: Host) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "/a"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "nothing"},
    ]
    assert chat(demo.port, messages, tools=TOOLS).status == 200


def test_the_second_turn_is_cached(demo: Host) -> None:
    first = chat(demo.port, LONG, max_tokens=2)
    again = chat(demo.port, LONG, max_tokens=2)
    assert again.cached >= first.json["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
        {"messages": [{"role": "user", "content": "x"}], "n": 2},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
    ],
)
def test_what_cannot_be_answered_is_openais_error(demo: Host, body: Any) -> None:
    reply = http_request(demo.port, "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_nulls_are_defaults_and_max_tokens_is_honoured(demo: Host) -> None:
    assert chat(demo.port, "Hi", max_tokens=None, temperature=None, tools=None, stop=None).text == GREETING
    for name in ("max_tokens", "max_completion_tokens"):
        reply = chat(demo.port, "Hi", **{name: 3})
        assert reply.json["usage"]["completion_tokens"] == 3
        assert reply.json["choices"][0]["finish_reason"] == "length"
    assert chat(demo.port, "Hi", stop="demo").text == GREETING.split("demo")[0]


def test_a_prompt_beyond_the_context_is_refused(models: Path) -> None:
    model = build_random(models / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with Host(model, free_port(), models / "none", backend="legacy") as host:
        assert chat(host.port, LONG).json["error"]["code"] == "context_length_exceeded"
        assert chat(host.port, "Hi", max_tokens=2).status == 200


def test_no_word_of_a_conversation_is_logged(demo: Host) -> None:
    chat(demo.port, "Abracadabra")
    http_request(demo.port, "/v1/chat/completions", b'{"messages": "Abracadabra')
    assert "chat: " in demo.log()
    assert "Abracadabra" not in demo.log()
    assert GREETING[:10] not in demo.log()


def test_names_key_size_and_queue(models: Path) -> None:
    host = random_host(
        models,
        accept_any_model=False,
        require_key=True,
        api_key="k",
        names=["m", "n"],
        max_body_bytes=5000,
        max_queue=0,
    )
    key = {"Authorization": "Bearer k"}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with host:
        for model, status in (("n", 200), ("other", 404)):
            reply = http_request(host.port, "/v1/chat/completions", {**body, "model": model}, headers=key)
            assert reply.status == status
        assert http_request(host.port, "/v1/chat/completions", body).json["error"]["code"] == "invalid_api_key"
        assert http_request(host.port, "/health").status == 200
        assert "tokens, " in host.log()


def test_counters_move_during_a_prefill_and_others_are_answered(models: Path) -> None:
    with random_host(models, prefill_batch=64) as host:
        asking = threading.Thread(target=chat, args=(host.port, LONG[:3000]), kwargs={"max_tokens": 200}, daemon=True)
        asking.start()
        until(lambda: host.counters.get("in_flight") == 1, 10, "work in flight")
        until(lambda: host.counters["processed_tokens"], 20, "a prefill that moves")
        first = host.counters["processed_tokens"]
        until(lambda: host.counters["processed_tokens"] > first, 20, "a prefill that moves on")
        assert http_request(host.port, "/health").status == 200
        assert host.counters["in_flight"] == 1  # it did not wait for the other's answer
        asking.join(60)
        until(lambda: host.counters["in_flight"] == 0 and host.counters["completion_tokens"] == 200, 10)
        assert host.counters["requests"] == 1


def test_a_client_that_leaves_frees_the_model(models: Path) -> None:
    with random_host(models) as host:
        for stream in (True, False):
            if stream:
                open_stream(host.port).close()
            else:
                with pytest.raises(TimeoutError):
                    http_request(
                        host.port,
                        "/v1/chat/completions",
                        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100000},
                        timeout_s=1,
                    )
            until(lambda: host.counters.get("requests", 0) and host.counters["in_flight"] == 0, 10, "an idle model")
            assert chat(host.port, "Hi", max_tokens=2).status == 200
        assert "client left" in host.log()


def test_several_at_once(models: Path) -> None:
    with random_host(models) as host:
        alone = {prompt: chat(host.port, prompt, max_tokens=TOKENS).text for prompt in PROMPTS}
        together: dict[str, set[str]] = {prompt: set() for prompt in PROMPTS}

        def ask(number: int) -> None:
            prompt = PROMPTS[number % len(PROMPTS)]
            together[prompt].add(chat(host.port, prompt, max_tokens=TOKENS, stream=False).text)

        with Crowd(ask, 6) as crowd:
            until(lambda: crowd.answered > 30, 60, "answers")
        assert (crowd.errors, crowd.refused) == ([], [])
        assert {prompt: {text} for prompt, text in alone.items()} == together


def test_a_drain_finishes_what_is_in_flight_and_leaves_the_rest_to_others(models: Path) -> None:
    host = random_host(models)
    with host:
        stream = open_stream(host.port, max_tokens=400)
        host.say({"type": "drain"})
        assert b"data: [DONE]" in rest_of(stream)
        assert host.process.wait(20) == 0
        # Whoever comes now is not refused, and is left to whoever accepts next.
        with socket.create_connection(("127.0.0.1", host.port), timeout=5):
            host.listener.setblocking(True)
            host.listener.accept()[0].close()


@pytest.mark.parametrize("how", ["SIGTERM", "stop"])
def test_a_stop_ends_what_is_in_flight_and_says_so(models: Path, how: str) -> None:
    with random_host(models) as host:
        stream = open_stream(host.port)
        if how == "stop":
            host.say({"type": "stop"})
        else:
            host.process.send_signal(signal.SIGTERM)
        assert b'"code": "stopping"' in rest_of(stream).replace(b'":"', b'": "')
        assert host.process.wait(10) == 0


def test_stopped_while_it_starts(models: Path) -> None:
    host = random_host(models)
    until(lambda: host.phases, 20, "a phase")
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(10) == 0


def test_without_its_supervisor_it_ends(models: Path) -> None:
    host = random_host(models)
    until(lambda: host.ready, 30, "ready")
    host.channel.shutdown(socket.SHUT_RDWR)
    assert host.process.wait(10) == 1


def test_a_torn_model_is_a_fault_that_names_it(models: Path) -> None:
    model = build_random(models / "torn")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    host = Host(model, free_port(), models / "none", backend="legacy")
    assert host.process.wait(30) == 1
    until(lambda: host.fault, 5, "the fault")
    assert "model.safetensors" in str(host.fault)


def test_a_model_that_cannot_be_loaded_is_a_fault(models: Path) -> None:
    model = build_random(models / "odd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 99}))
    host = Host(model, free_port(), models / "none", backend="legacy")
    assert host.process.wait(30) == 1
    until(lambda: host.fault, 5, "the fault")
    assert "cannot be loaded" in str(host.fault)


def test_without_mlx_textgen_it_serves_and_the_other_names_it(models: Path, tmp_path: Path) -> None:
    path = without_textgen(tmp_path / "path")
    model = build_demo(models / "demo")
    with Host(model, free_port(), models / "none", backend="legacy", PYTHONPATH=path) as host:
        assert chat(host.port, "Hi").text == GREETING
    other = Host(model, free_port(), models / "none", PYTHONPATH=path)
    assert other.process.wait(30) == 1
    until(lambda: other.fault, 5, "the fault")
    assert "mlx-textgen cannot be imported" in str(other.fault)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_a_family_answers_as_mlx_lm_does(models: Path, family: str) -> None:
    model = build_random(models / f"as-{family}", family)
    turns: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with Host(model, free_port(), models / "none", backend="legacy") as host:
        cold, warm = ([chat(host.port, turn, max_tokens=TOKENS).text for turn in turns] for _ in range(2))
    # mlx-lm's streaming detokenizer drops a leading space.
    expected = [text.removeprefix(" ") for text in reference(model, turns)]
    assert (cold, warm) == (expected, expected)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path / "state")
    yield launcher
    launcher.clean_up()


def test_start_with_its_mode_and_a_kill(launcher: Launcher) -> None:
    launcher.start("--demo", "--mode=mlx-legacy")
    status = launcher.status()
    assert (status["state"], status["backend"], status["model"]["id"]) == ("ready", "mlx-legacy", "demo")
    assert chat(launcher.port, "Hi", model="demo").text == GREETING
    until(lambda: launcher.status()["activity"]["requests"] == 1, 10, "a request that is counted")
    first = launcher.server_pid()
    os.kill(first, signal.SIGKILL)
    assert chat(launcher.port, "Hi").text == GREETING
    assert launcher.server_pid() != first
    assert launcher.command("restart").returncode == 0
    assert chat(launcher.port, "Hi").text == GREETING
    assert launcher.command("stop").returncode == 0
    assert launcher.processes() == []


def test_anyclaudes_venv_has_not_to_be_ours(launcher: Launcher, tmp_path: Path) -> None:
    """Its Python runs the script; ours runs the server."""
    model = build_demo(tmp_path / "with a space" / "demo")
    script = Path(__file__).parents[2] / "scripts" / "mlx-server.py"
    environment = {
        "MLX_LAUNCH_PYTHON": sys.executable,
        "MLX_LAUNCH_STATE_DIR": str(launcher.state_dir),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    server = subprocess.Popen(
        # Nothing of ours can be imported with these flags.
        [sys.executable, "-I", "-S", str(script), "--model", str(model), "--port", str(launcher.port)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        until(lambda: server.poll() is not None or _answers(launcher.port), 60, "the server")
        assert chat(launcher.port, "Hi").text == GREETING
        assert launcher.status()["backend"] == "mlx-legacy"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)
    until(lambda: not launcher.processes(), 20, "an end without leftovers")


def _answers(port: int) -> bool:
    try:
        return http_request(port, "/v1/models", timeout_s=10).status == 200
    except ConnectionRefusedError:
        return False
