"""Chat templates as small as they can be with the markers of the families that they stand for."""

_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
_CHATML_TEXT = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(call: str, tools: str = _TOOLS) -> str:
    assistant = "<|im_start|>assistant\n{{ m.content }}{% for c in m.tool_calls %}" + call + "{% endfor %}<|im_end|>\n"
    body = (
        "{% for m in messages %}{% if m.tool_calls %}"
        + assistant
        + "{% else %}"
        + _CHATML_TEXT
        + "{% endif %}{% endfor %}"
    )
    return tools + body + _PROMPT


QWEN_JSON = _chatml(
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
QWEN_XML = _chatml(
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
GLM = _chatml(
    "<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>"
)
LLAMA = _chatml('{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}')
MISTRAL = _chatml(
    '[TOOL_CALLS][{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}]'
)
HARMONY = (
    _TOOLS + "{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %}<|channel|>commentary "
    "to=functions.{{ m.tool_calls[0].function.name }} <|constrain|>json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
NO_TOOLS = "{% for m in messages %}" + _CHATML_TEXT + "{% endfor %}" + _PROMPT
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + _CHATML_TEXT
    + "{% endfor %}"
    + _PROMPT
)
