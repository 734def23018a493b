import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.requests import Guide, Tool, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "stop"}},
]


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HELLO, **fields}).encode()


def refusal(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat(raw)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b"\xff", None),
        (chat().decode().encode("utf-16"), None),
        (b'{"messages": [{"role": "user", "content": "\xed\xa0\xbd"}]}', None),
        (b"{}", "messages"),
        (chat(messages=[]), "messages"),
        (chat(messages=None), "messages"),
        (chat(messages=[{"role": "nobody", "content": ""}]), "messages.0.role"),
        (chat(temperature="warm"), "temperature"),
        (chat(temperature=-1), "temperature"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(n=0), "n"),
        (chat(stream="yes"), "stream"),
        (chat(tools=[{"type": "function"}]), "tools.0.function"),
        (chat(logit_bias={"x": 1}), "logit_bias"),
        (chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "write"}}), "tool_choice"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(tools=TOOLS, tool_choice="required", guided_json={}), "tool_choice"),
        (chat(guided_regex="a", guided_choice=["b"]), None),
        (chat(response_format={"type": "json_schema"}), "response_format"),
    ],
)
def test_a_bad_request_is_a_400_that_names_the_part(raw: bytes, param: str | None) -> None:
    error = refusal(raw)
    assert error.status == 400
    assert error.param == param or (error.param or "").startswith(f"{param}.")


@pytest.mark.parametrize("half", ["\ud83d", "\ude00\ud83d"])
def test_half_a_character_is_no_reason_to_refuse_a_conversation(half: str) -> None:
    tool = {"type": "function", "function": {"name": "a", "description": f"{half}\U0001f600"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": f"cut {half} here"}]}]
    generation = parse_chat(chat(messages=messages, tools=[tool], stop=half))[1]
    replaced = "\ufffd" * len(half)
    assert generation.messages == [{"role": "user", "content": [{"type": "text", "text": f"cut {replaced} here"}]}]
    assert generation.tools is not None
    assert generation.tools[0]["function"]["description"] == f"{replaced}\U0001f600"
    assert generation.stop == [replaced]


def test_null_means_the_default_wherever_openai_says_so() -> None:
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "max_tokens",
        "tools",
        "tool_choice",
        "response_format",
    )
    _, generation = parse_chat(chat(**dict.fromkeys(names)))
    assert (generation.sampling, generation.stop, generation.n, generation.max_tokens) == ({}, [], 1, None)


def test_what_is_not_known_is_ignored() -> None:
    body, _ = parse_chat(chat(user="u", metadata={"a": 1}, parallel_tool_calls=False))
    assert body.messages[0].content == "Hi"


def test_tools_are_callable_by_choice() -> None:
    both = [Tool("read", {"type": "object"}), Tool("stop", {"type": "object"})]
    cases = [
        (None, both, False, TOOLS),
        ("auto", both, False, TOOLS),
        ("required", both, True, TOOLS),
        ("none", [], False, None),
        ({"type": "function", "function": {"name": "stop"}}, both[1:], True, TOOLS),
    ]
    for choice, tools, must, shown in cases:
        _, generation = parse_chat(chat(tools=TOOLS, tool_choice=choice))
        assert (generation.callable_tools, generation.must_call, generation.tools) == (tools, must, shown)


def test_guides() -> None:
    schema = {"type": "object", "properties": {}}
    cases: list[tuple[dict[str, Any], Guide | None]] = [
        ({"guided_json": schema}, Guide("json", schema)),
        ({"guided_choice": ["a"]}, Guide("choice", ["a"])),
        ({"guided_regex": "a+"}, Guide("regex", "a+")),
        ({"guided_grammar": "start: /a/"}, Guide("grammar", "start: /a/")),
        ({"response_format": {"type": "json_object"}}, Guide("json", {"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            Guide("json", schema),
        ),
        ({"response_format": {"type": "text"}}, None),
    ]
    for fields, guide in cases:
        assert parse_chat(chat(**fields))[1].guide == guide


def test_completions_take_one_prompt_or_several() -> None:
    assert parse_completion(b'{"prompt": "a"}')[1].prompts == ["a"]
    assert parse_completion(b'{"prompt": ["a", "b"], "stop": "x"}')[1].stop == ["x"]
    with pytest.raises(RequestError):
        parse_completion(b'{"prompt": []}')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["messages", "tools", "tool_choice", "stop", "n", "temperature", "response_format", "logit_bias", "prompt"]
)


@given(st.dictionaries(fields, json_values))
def test_any_json_is_a_generation_or_a_400(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for parse in (parse_chat, parse_completion):
        with contextlib.suppress(RequestError):
            parse(raw)


@pytest.mark.parametrize(("seed", "taken"), [(-1, 2**64 - 1), (0, 0), (2**64 - 1, 2**64 - 1)])
def test_any_seed_of_64_bits_is_taken(seed: int, taken: int) -> None:
    raw = json.dumps({"messages": HELLO, "seed": seed}).encode()
    assert parse_chat(raw)[1].sampling["seed"] == taken


def test_a_larger_seed_is_refused() -> None:
    raw = json.dumps({"messages": HELLO, "seed": 2**64}).encode()
    with pytest.raises(RequestError, match="seed"):
        parse_chat(raw)
