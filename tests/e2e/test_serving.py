"""The demo model through the whole product."""

import json
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from support.launched import Crowd, Launcher, chat, http_request, stream_events
from support.waiting import until

from mlx_launcher.demo import AFTER_RESULT, GREETING

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather somewhere",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "days", "unit"],
            "additionalProperties": False,
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture(scope="module")
def client(demo: Launcher) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{demo.port}/v1", api_key="any", max_retries=0)


def test_the_curl_that_start_prints_works_as_pasted(demo: Launcher) -> None:
    again = demo.command("start", "--demo", "--port", str(demo.port))
    assert again.returncode == 0
    command = re.search(r"curl (?:.*\\\n)*.*", again.stdout)
    assert command, again.stdout
    answer = subprocess.run(shlex.split(command[0].replace("\\\n", " ")), capture_output=True, timeout=30, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == GREETING


def test_status_is_ready_and_counts_what_users_asked(launcher: Launcher) -> None:
    launcher.start("--demo")
    assert launcher.status()["activity"]["requests"] == 0
    chat(launcher.port, "Hi")
    status = until(lambda: (s := launcher.status())["activity"]["requests"] == 1 and s)
    assert (status["state"], status["listener"], status["model"]["id"]) == ("ready", "owned", "demo")
    assert status["activity"]["completion_tokens"] > 5


def test_openai_client_chat_and_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])
    assert whole.choices[0].message.content == GREETING
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == GREETING
    assert chunks[-1].usage == whole.usage


def test_openai_client_completions_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    whole = client.completions.create(model="demo", prompt=["Hello!", "Hello!"], max_tokens=3)
    assert [choice.text for choice in whole.choices] == [" I am the"] * 2


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called_with_valid_arguments_and_its_result_answered(
    demo: Launcher, choice: Any, streamed: bool
) -> None:
    question = [{"role": "user", "content": "What is the weather?"}]
    reply = chat(demo.port, question, tools=[WEATHER, STOP], tool_choice=choice, stream=streamed)
    if streamed:
        *chunks, done = stream_events(reply.body)
        assert done == "[DONE]"
        calls = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        calls = reply.json["choices"][0]["message"]["tool_calls"]
        reason = reply.json["choices"][0]["finish_reason"]
    assert reason == "tool_calls"
    assert len(calls) == 1
    arguments = json.loads(calls[0]["function"]["arguments"])
    assert set(arguments) == {"city", "days", "unit"}
    assert isinstance(arguments["days"], int)
    assert arguments["unit"] in {"c", "f"}

    call = {name: value for name, value in calls[0].items() if name != "index"}
    turn = [
        *question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "Sunny."},
    ]
    assert chat(demo.port, turn, tools=[WEATHER, STOP]).text == AFTER_RESULT


def test_no_call_where_none_is_wanted(demo: Launcher) -> None:
    assert chat(demo.port, "Hi", tools=[WEATHER], tool_choice="none").text == GREETING


def test_what_max_tokens_cuts_ends_with_length(demo: Launcher) -> None:
    text = chat(demo.port, "Hi", max_tokens=3).json["choices"][0]
    assert (text["message"]["content"], text["finish_reason"]) == ("Hello! I am", "length")
    call = chat(demo.port, "Hi", tools=[WEATHER], tool_choice="required", max_tokens=5).json["choices"][0]
    assert (call["message"].get("tool_calls"), call["finish_reason"]) == (None, "length")


def test_stop_strings_and_guides(demo: Launcher) -> None:
    assert chat(demo.port, "Hi", stop=[" am"]).text == "Hello! I"
    assert chat(demo.port, "Hi", guided_choice=["yes", "no"]).text in {"yes", "no"}
    assert re.fullmatch("[0-9]{3}", chat(demo.port, "Hi", guided_regex="[0-9]{3}").text)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert isinstance(json.loads(chat(demo.port, "Hi", response_format=wanted).text)["ok"], bool)


def test_both_loopback_addresses_answer(demo: Launcher) -> None:
    hosts = ["127.0.0.1"] + (["::1"] if "::1" in json.dumps(demo.status()["settings"]["hosts"]) else [])
    for host in hosts:
        assert http_request(demo.port, "/health", host=host).json["model_loaded"] is True


def test_any_model_name_is_served_and_an_unknown_path_is_not(demo: Launcher) -> None:
    assert chat(demo.port, "Hi", model="claude-something").text == GREETING
    assert http_request(demo.port, "/v1/models/claude-something").status == 404
    assert http_request(demo.port, "/v2").status == 404


def test_health_is_answered_while_a_long_prompt_is_processed(demo: Launcher) -> None:
    replies = []
    prompt = "x" * 60_000
    asking = threading.Thread(target=lambda: replies.append(chat(demo.port, prompt, max_tokens=1)))
    asking.start()
    until(lambda: demo.status()["activity"]["in_flight"] == 1)
    answered = sum(http_request(demo.port, "/health").status == 200 for _ in range(20))
    still_at_it = not replies
    asking.join()
    assert (answered, still_at_it) == (20, True)
    assert replies[0].status == 200


def test_eight_clients_streamed_and_not_get_every_answer_whole(demo: Launcher) -> None:
    def ask(number: int) -> None:
        if number % 2:
            assert chat(demo.port, f"Hi {number}").text == GREETING
        else:
            *chunks, done = stream_events(chat(demo.port, f"Hi {number}", stream=True).body)
            assert done == "[DONE]"
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == GREETING

    before = demo.server_pid()
    with Crowd(ask, clients=8) as crowd:
        until(lambda: crowd.answered > 80, timeout_s=60, what="80 answers")
    assert (crowd.errors, crowd.refused) == ([], [])
    assert demo.server_pid() == before


def test_nothing_of_a_prompt_or_an_answer_is_written_to_a_log(demo: Launcher) -> None:
    chat(demo.port, "Xylophone-4711")
    http_request(demo.port, "/v1/chat/completions", b'{"messages": "Xylophone-4711"')
    logs = [path for path in demo.state_dir.rglob("*") if path.is_file() and "kvcache" not in path.parts]
    assert any(path.name == "server.log" for path in logs)
    assert [path for path in logs if b"Xylophone" in path.read_bytes() or (b"and every part in between" in path.read_bytes()
            and "models" not in path.parts)] == []  # fmt: skip


def test_an_empty_prompt_is_a_400(demo: Launcher) -> None:
    for prompt in ("", ["Hello!", ""]):
        reply = http_request(demo.port, "/v1/completions", {"prompt": prompt, "max_tokens": 3})
        assert reply.status == 400
        assert reply.json["error"]["param"] == "prompt"


def test_a_seed_repeats_all_answers_and_they_are_several(launcher: Launcher, random_model: Path) -> None:
    launcher.start("--model", str(random_model))

    def answers(**fields: Any) -> list[str]:
        body = {"prompt": "abc", "n": 3, "temperature": 1.0, "max_tokens": 8, **fields}
        reply = http_request(launcher.port, "/v1/completions", body)
        return [choice["text"] for choice in reply.json["choices"]]

    first, unseeded, again, other = answers(seed=7), answers(), answers(seed=7), answers()
    assert first == again
    assert len({*first, *unseeded, *other}) == 9, "only what has the seed repeats"


def test_a_tool_is_called_though_its_schema_has_what_no_grammar_follows(demo: Launcher) -> None:
    parameters = {**WEATHER["function"]["parameters"], "propertyNames": {"type": "string"}}
    tool = {"type": "function", "function": {**WEATHER["function"], "parameters": parameters}}
    reply = chat(demo.port, "What is the weather?", tools=[tool])
    assert reply.status == 200, reply.body
    (call,) = reply.json["choices"][0]["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days", "unit"}
