"""Harmony (gpt-oss) in the terms of mlx-lm's server, which knows it not: states of the text, and a parser of calls.

The same format as in channels.py, where it is explained; mlx-lm has its own machinery for what stands between markers.
"""

import json
import re
from typing import Any

from mlx_lm.generate import TextStateMachine

# What stands in a header is nobody's text; mlx-lm shows "normal", gives "reasoning" apart, and hands "tool" to the parser.
_HEADER = "header"
STATES = TextStateMachine(
    {
        "normal": [("<|channel|>", _HEADER), ("<|start|>", _HEADER), ("<|end|>", _HEADER)],
        "reasoning": [("<|channel|>", _HEADER), ("<|start|>", _HEADER), ("<|end|>", _HEADER)],
        _HEADER: [
            ("final<|message|>", "normal"),
            ("final <|constrain|>json<|message|>", "normal"),
            ("<|message|>", "reasoning"),
            ("to=functions.", "tool"),
        ],
        # Through "normal", because that is where mlx-lm takes a call for finished.
        "tool": [("<|call|>", "normal"), ("<|end|>", "normal")],
    }
)
_CALL = re.compile(r"([\w.-]+).*?<\|message\|>(.*)", re.DOTALL)


def is_spoken_by(tokenizer: Any) -> bool:
    template = tokenizer.chat_template
    return isinstance(template, str) and "<|channel|>" in template and "<|call|>" in template


def parse_call(text: str, _tools: Any) -> dict[str, Any]:
    """`NAME <|constrain|>json<|message|>{…}` as a call; ValueError for one that is cut."""
    found = _CALL.match(text)
    if found is None:
        raise ValueError("a call without arguments")
    return {"name": found[1], "arguments": json.loads(found[2].strip() or "{}")}
