"""How a model writes a tool call: found from its chat template, once, when it is loaded.

A JSON style is followed by constrained decoding, so a call is always well formed; other styles are parsed with mlx-lm's
parsers. Harmony (gpt-oss) is in channels.py, because there text has markers too.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import _infer_tool_parser

Tools = list[dict[str, Any]]
Parsed = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Style:
    """`start` opens a call and `end` closes it ("": the end of the answer does). With `arguments_key` a call is a JSON object
    `{"name": …, arguments_key: …}`. `bare`: `start` is the object's own beginning. `in_template`: the template shows tools;
    else the system message has to.
    """

    name: str
    start: str
    end: str
    arguments_key: str | None
    parse: Callable[[str, Tools], Parsed]
    bare: bool = False
    in_template: bool = True


def detect(tokenizer: Any) -> Style | None:
    """The style of this tokenizer's template; None for Harmony, whose calls are in channels."""
    template = tokenizer.chat_template
    if isinstance(template, str) and "<|channel|>" in template and "<|call|>" in template:
        return None
    if not shows_tools(tokenizer):
        return HERMES
    return _json_style(tokenizer) or _parsed_style(tokenizer) or HERMES


def shows_tools(tokenizer: Any) -> bool:
    """Whether the template puts offered tools into the prompt."""
    with_tools, without = (_rendered(tokenizer, [_USER], tools) for tools in ([_TOOL], None))
    return with_tools is not None and with_tools != without


def _json_call(arguments_key: str) -> Callable[[str, Tools], Parsed]:
    def parse(text: str, _tools: Tools) -> Parsed:
        call = json.loads(text)
        return [(call["name"], call[arguments_key])]

    return parse


def _json_style(tokenizer: Any) -> Style | None:
    """Reads the style off a rendered call: what stands between the generation prompt and the JSON object, and behind it."""
    before = _rendered(tokenizer, [_USER], [_TOOL], add_generation_prompt=True)
    after = _rendered(tokenizer, [_USER, _CALL], [_TOOL])
    if before is None or after is None:
        return None
    common = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    shown = after[common:]
    begin = shown.find("{")
    try:
        call, size = json.JSONDecoder().raw_decode(shown[begin:]) if begin >= 0 else (None, 0)
    except ValueError:
        return None
    if not isinstance(call, dict) or list(call)[:1] != ["name"] or len(call) != 2 or call["name"] != _NAME:
        return None
    key = list(call)[1]
    if key not in ("arguments", "parameters") or call[key] != _ARGUMENTS:
        return None
    # A template may open every answer with what the generation prompt leaves to the model, such as an empty thought.
    start = shown[:begin].rsplit("</think>", 1)[-1].lstrip("\n") if "</think>" in shown[:begin] else shown[:begin]
    end = shown[begin + size :].strip().split(tokenizer.eos_token or "\0")[0].strip()
    if not start.strip():
        return Style("json", '{"name"', "", key, _json_call(key), bare=True)
    return Style("json", start, end, key, _json_call(key))


def _parsed_style(tokenizer: Any) -> Style | None:
    name = _infer_tool_parser(tokenizer)
    if name is None:
        return None
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")

    def parse(text: str, tools: Tools) -> Parsed:
        parsed = module.parse_tool_call(text, tools)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [(str(call["name"]), dict(call["arguments"])) for call in calls]

    return Style(name, module.tool_call_start, module.tool_call_end, None, parse)


# What mlx-textgen falls back to as well.
HERMES = Style("hermes", "<tool_call>\n", "</tool_call>", "arguments", _json_call("arguments"), in_template=False)

_NAME = "probe_of_the_style"
_ARGUMENTS = {"probe": "value"}
_USER = {"role": "user", "content": "x"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "x",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}, "required": ["probe"]},
    },
}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}


def _rendered(tokenizer: Any, messages: Tools, tools: Tools | None, **options: Any) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))
    except Exception:
        # A template that cannot show this says nothing about the style.
        return None
