"""Every style of tool call: found from the template, and read from text however it is cut into pieces."""

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import templates
from transformers import AutoTokenizer

from mlx_launcher.demo import build_random
from mlx_launcher.host.chat import render
from mlx_launcher.host.decoding import Sequence
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.events import Call, Ended, Text
from mlx_launcher.host.reading import reader_for
from mlx_launcher.host.styles import HERMES, Style, detect

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
ARGUMENTS = {"city": "Köln", "days": 3}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)

STYLES: dict[str, Style | None] = {}


@pytest.fixture(scope="module", autouse=True)
def styles(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = AutoTokenizer.from_pretrained(build_random(tmp_path_factory.mktemp("models") / "random"))
    for name in ("QWEN_JSON", "QWEN_XML", "GLM", "LLAMA", "MISTRAL", "HARMONY", "NO_TOOLS"):
        tokenizer.chat_template = getattr(templates, name)
        STYLES[name] = detect(tokenizer)


def test_a_style_is_found_from_its_template() -> None:
    found = {name: (style.name, style.start, style.end, style.arguments_key) for name, style in STYLES.items() if style}
    assert found == {
        "QWEN_JSON": ("json", "<tool_call>\n", "</tool_call>", "arguments"),
        "QWEN_XML": ("qwen3_coder", "<tool_call>", "</tool_call>", None),
        "GLM": ("glm47", "<tool_call>", "</tool_call>", None),
        "LLAMA": ("json", '{"name"', "", "parameters"),
        "MISTRAL": ("mistral", "[TOOL_CALLS]", "", None),
        "NO_TOOLS": ("hermes", "<tool_call>\n", "</tool_call>", "arguments"),
    }
    assert STYLES["HARMONY"] is None
    assert STYLES["NO_TOOLS"] is HERMES


JSON_CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
LLAMA_CALL = json.dumps({"name": "weather", "parameters": ARGUMENTS}, ensure_ascii=False)
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM_CALL = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>"
)
CALL = ("weather", ARGUMENTS)
HARMONY_CALL = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{TEXT}<|call|>"

# style -> (what the model writes, the content, the reasoning, the calls)
WRITTEN: list[tuple[str, str, str, str, list[Any]]] = [
    ("QWEN_JSON", f"Let me look. <tool_call>\n{JSON_CALL}\n</tool_call>", "Let me look. ", "", [CALL]),
    ("QWEN_JSON", f"<tool_call>\n{JSON_CALL}\n</tool_call>\n<tool_call>\n{JSON_CALL}\n</tool_call>", "", "", [CALL, CALL]),
    ("QWEN_JSON", "No call, only <tool and {braces}.", "No call, only <tool and {braces}.", "", []),
    ("QWEN_XML", f"Look:\n{XML_CALL}", "Look:\n", "", [CALL]),
    ("QWEN_XML", f"{XML_CALL}\n{XML_CALL}", "", "", [CALL, CALL]),
    ("GLM", GLM_CALL, "", "", [CALL]),
    ("LLAMA", LLAMA_CALL, "", "", [CALL]),
    ("LLAMA", f"Write {LLAMA_CALL} to call it.", f"Write {LLAMA_CALL} to call it.", "", []),
    ("MISTRAL", f'[TOOL_CALLS][{JSON_CALL[:-1]}, "id": "x"}}]', "", "", [CALL]),
    ("MISTRAL", f"[TOOL_CALLS]weather[ARGS]{TEXT}", "", "", [CALL]),
    ("HARMONY", f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{HARMONY_CALL}", "", "Hm.", [CALL]),
    ("HARMONY", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi", "Hi", "Hm.", []),
    ("HARMONY", "<|channel|>final<|message|>a < b<|return|>", "a < b", "", []),
    ("NO_TOOLS", f"<tool_call>\n{JSON_CALL}\n</tool_call>", "", "", [CALL]),
]  # fmt: skip


class Script:
    """Stands for model, tokenizer, detokenizer and sampler: its tokens are pieces of a text that is given. Its logits are the
    token that follows the one it was run on.
    """

    looks_back = False

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = [*pieces, ""]
        self.end = len(pieces)  # the token that ends the answer
        self.tokenizer = self
        self.structured_processor: Any = None
        self.last_segments = [""]

    def detokenizer_class(self, tokenizer: Any) -> "Script":
        return self

    def add_tokens(self, tokens: list[list[int]]) -> None:
        self.last_segments = [self.pieces[tokens[0][0]]]

    def finalize(self) -> None:
        self.last_segments = [""]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.pieces.append(text)
        return [len(self.pieces) - 1]

    def sample(self, logits: mx.array, token_ids: Any, start: int) -> tuple[mx.array, None]:
        return logits, None

    def _inference(self, tokens: mx.array, **_: Any) -> mx.array:
        return mx.minimum(tokens + 1, self.end)


class JsonMatcher:
    """Stands for a grammar of one JSON object."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._text = ""
        self.finished = False

    def consume(self, tokens: list[int]) -> bool:
        text = self._text + "".join(self._script.pieces[token] for token in tokens)
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            fits = not text or text.startswith("{")
        else:
            fits = self.finished = text.startswith("{") and end == len(text)
        if fits:
            self._text = text
        return fits


def cut(text: str, cuts: set[int]) -> list[str]:
    """The text in pieces. No piece goes beyond the end of a JSON object: the mask does not let a token do that."""
    ends = {at + 1 for at, character in enumerate(text) if character == "}"}
    places = sorted({0, len(text), *ends, *(at for at in cuts if at < len(text))})
    return [text[a:b] for a, b in pairwise(places)]


def read(name: str, pieces: list[str], **options: Any) -> tuple[str, str, list[Any], str]:
    script = Script(pieces)
    choices: dict[str, Any] = {"may_call": True, "must_call": False, "single": False, "opened": "", **options}
    reader = reader_for(STYLES[name], TOOLS, **choices)
    sequence = Sequence(
        script,
        [],
        mx.zeros((1, 1), dtype=mx.int32),
        script,
        reader,
        lambda: JsonMatcher(script),
        [],
        {script.end},
        None,
    )
    told = list(sequence.run(0, mx.zeros((1, 1), dtype=mx.int32), 10_000, threading.Event(), Counters()))
    texts = [event for event in told if isinstance(event, Text)]
    content = "".join(event.text for event in texts if not event.reasoning)
    reasoning = "".join(event.text for event in texts if event.reasoning)
    calls = [(event.name, json.loads(event.arguments)) for event in told if isinstance(event, Call)]
    last = told[-1]
    assert isinstance(last, Ended)
    return content, reasoning, calls, last.reason


@pytest.mark.parametrize(("name", "text", "content", "reasoning", "calls"), WRITTEN)
@settings(max_examples=30, deadline=None)
@given(cuts=st.sets(st.integers(1, 200)))
def test_what_is_written_is_read_however_it_is_cut(
    name: str, text: str, content: str, reasoning: str, calls: list[Any], cuts: set[int]
) -> None:
    reason = "tool_calls" if calls else "stop"
    assert read(name, cut(text, cuts)) == (content, reasoning, calls, reason)


@pytest.mark.parametrize("name", ["QWEN_JSON", "QWEN_XML", "HARMONY"])
def test_one_call_is_enough_where_only_one_is_allowed(name: str) -> None:
    written = {"QWEN_JSON": f"<tool_call>\n{JSON_CALL}\n</tool_call>", "QWEN_XML": XML_CALL, "HARMONY": HARMONY_CALL}[
        name
    ]
    assert read(name, cut(f"{written}\n{written}", set()), single=True)[2] == [CALL]


@pytest.mark.parametrize(
    ("name", "text"),
    [("QWEN_JSON", JSON_CALL), ("LLAMA", LLAMA_CALL), ("QWEN_XML", XML_CALL.removeprefix("<tool_call>"))],
)
def test_a_call_that_has_to_be_made_is_read_from_behind_its_marker(name: str, text: str) -> None:
    assert read(name, cut(text, set()), must_call=True)[2:] == ([CALL], "tool_calls")


def test_harmony_goes_on_where_the_prompt_opened_a_call() -> None:
    opened = "<|channel|>commentary to=functions."
    text = HARMONY_CALL.removeprefix(opened)
    assert read("HARMONY", cut(text, set()), must_call=True, opened=opened)[2:] == ([CALL], "tool_calls")


@pytest.mark.parametrize("name", ["QWEN_XML", "GLM", "MISTRAL"])
def test_a_malformed_call_is_shown_as_the_text_that_it_is(name: str) -> None:
    style = STYLES[name]
    assert style
    text = f"{style.start}no call at all{style.end}"
    assert read(name, cut(text, set())) == (text, "", [], "stop")


def test_a_marker_that_no_call_follows_is_text() -> None:
    text = "<tool_call>\n[1, 2]"
    assert read("QWEN_JSON", cut(text, set())) == (text, "", [], "stop")


def test_text_behind_a_call_ends_the_answer() -> None:
    text = f"<tool_call>\n{JSON_CALL}\n</tool_call>\nI have called it."
    assert read("QWEN_JSON", cut(text, set())) == ("", "", [CALL], "tool_calls")


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "user", "content": "Are you there?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": TEXT}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
]


def tokenizer_of(template: str, directory: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(build_random(directory / "random"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ["QWEN_JSON", "QWEN_XML", "GLM", "LLAMA", "MISTRAL", "HARMONY"])
def test_what_an_agent_sends_back_is_rendered_whole(template: str, tmp_path: Path) -> None:
    prompt = render(tokenizer_of(getattr(templates, template), tmp_path), CONVERSATION, TOOLS)
    assert all(part in prompt for part in ("Be brief.", "Be kind.", "Are you there?", "Köln", "Sunny"))


def test_a_template_without_tools_is_told_of_them_in_the_system_message(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(templates.NO_TOOLS, tmp_path)
    prompt = render(tokenizer, CONVERSATION, TOOLS, description="Tools: $$tool_list$$")
    system = prompt.split("<|im_end|>")[0]
    assert "Be brief." in system
    assert '"name": "weather"' in system
    assert f"<tool_call>\n{JSON_CALL}\n</tool_call>" in prompt
    assert "<tool_response>\nSunny\n</tool_response>" in prompt


def test_roles_that_a_template_refuses_are_put_in_an_order_that_says_the_same(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(templates.STRICT, tmp_path)
    prompt = render(tokenizer, CONVERSATION[:4], None)
    assert prompt.count("<|im_start|>") == 2
    assert all(part in prompt for part in ("Be brief.", "Be kind.", "Hello", "Are you there?"))
    with pytest.raises(RequestError, match="roles must alternate"):
        render(tokenizer, [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "x"}], None)
