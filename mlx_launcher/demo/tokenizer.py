"""One tokenizer for all built models: a token for each byte, with the byte's value as its id, then special tokens, then
whole words.

The words let a model that sees only the last token know where in its sentence it is. They are added tokens of a BPE
tokenizer, because llguidance refuses WordLevel; they are ASCII, because a ByteLevel decoder would take other characters for
the names of bytes.
"""

import json

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
# What a generation prompt ends in says what kind of answer is due, and the last token is all that the demo model sees.
PLAIN = "<|plain|>"
WITH_TOOLS = "<|with_tools|>"
AFTER_RESULT = "<|after_result|>"
SPECIAL = (PAD, START, END, PLAIN, WITH_TOOLS, AFTER_RESULT)

# Not special, or they would be left out of the decoded text.
CALL_START = "<tool_call>"
CALL_END = "</tool_call>"

# No word may occur twice, in either: it would have two successors.
GREETING = "Hello! I am the demo model of mlx-launch: your request reached me, and every part in between works."
FINISH = "Thank you: that tool answered, so our whole round trip is complete."

# A past assistant message begins with the marker that it was generated after: so a conversation stays a prefix of its next
# turn, and mlx-textgen, which subtracts one rendered conversation from another, finds where a tool call starts.
# `tool.function` is not read: mlx-textgen renders tools that have no such key.
_MARKER = r"""{{- '<|after_result|>' if turn.after_result else '<|with_tools|>' if tools else '<|plain|>' -}}"""
CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turn = namespace(after_result=false) -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}{{- text(messages[0].content) + '\n\n' -}}{%- endif -%}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}MARKER
        {{- text(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set tool_call = call.function or call -%}
            {{- '\n' if message.content or not loop.first -}}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' -}}
            {%- if tool_call.arguments is string -%}
                {{- tool_call.arguments or '{}' -}}
            {%- else -%}
                {{- tool_call.arguments | tojson -}}
            {%- endif -%}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
        {%- set turn.after_result = false -%}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\n<tool_response>\n' + text(message.content) + '\n</tool_response><|im_end|>\n' -}}
        {%- set turn.after_result = true -%}
    {%- elif not (tools and loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\n' + text(message.content) + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}MARKER
{%- endif -%}
""".replace("MARKER", _MARKER)


def words(sentence: str) -> list[str]:
    """The tokens of one of the sentences: each word with the space before it."""
    first, *rest = sentence.split(" ")
    return [first, *(f" {word}" for word in rest)]


WORDS = (*words(GREETING), *words(FINISH))
ADDED = (*SPECIAL, CALL_START, CALL_END, *WORDS)
IDS = {content: 256 + index for index, content in enumerate(ADDED)}

# Of the models: more than the tokenizer knows, as with real ones, so that mistaking one for the other shows.
VOCAB_SIZE = 320


def files() -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, which holds the chat template."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": content, **flags, "special": content in SPECIAL}
            for content, number in IDS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(_byte_names())}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(config)}


def _byte_names() -> list[str]:
    """The printable characters by which ByteLevel tokenizers since GPT-2 name the 256 bytes."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1, ensure_ascii=False).encode()
