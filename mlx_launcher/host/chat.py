"""Turns OpenAI's messages into the prompt text of the model's own chat template.

Templates differ in what they accept. What a template refuses is offered to it again in other forms that say the same; only
if it refuses them all is the request refused, in the template's own words.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from mlx_launcher.host.errors import RequestError

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]


def render(tokenizer: Any, messages: Messages, tools: Tools | None, *, description: str | None = None) -> str:
    """The prompt up to where the model goes on; a last assistant message is continued.

    With a `description` ("… $$tool_list$$ …") the system message shows the tools, not the template. Raises RequestError 400.
    """
    prepared = prepare(messages)
    if description is not None:
        prepared, tools = _with_tools_described(prepared, tools, description), None
    return accepted(tokenizer, prepared, tools)[1]


def accepted(tokenizer: Any, prepared: Messages, tools: Tools | None) -> tuple[Messages, str]:
    """The first form of the messages that the template takes, and the prompt; raises RequestError 400 where it takes none."""
    refusal: Exception | None = None
    for form in _forms(prepared):
        try:
            return form, _apply(tokenizer, form, tools)
        except Exception as error:
            # Templates raise whatever they like, most often jinja2's TemplateError with a sentence about roles.
            refusal = refusal or error
    raise RequestError(400, f"the model's chat template refuses these messages: {refusal}", param="messages")


def _apply(tokenizer: Any, messages: Messages, tools: Tools | None) -> str:
    continues = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    )


def _forms(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, then with one repair after another on top of the last."""
    repairs: list[Callable[[Messages], Messages]] = [
        _one_system_message,
        _alternating,
        _arguments_as_text,
        _system_in_user,
    ]
    yield messages
    for repair in repairs:
        repaired = repair(messages)
        if repaired != messages:
            messages = repaired
            yield messages


def _one_system_message(messages: Messages) -> Messages:
    """All system messages as one, at the start: some templates take no second one, or none further down."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(systems)}, *rest] if systems else messages


def _alternating(messages: Messages) -> Messages:
    """Neighbours of one role as one message: some templates demand that user and assistant take turns."""
    merged: Messages = []
    for message in messages:
        last = merged[-1] if merged else None
        plain = message.keys() <= {"role", "content"} and message["role"] in ("user", "assistant")
        if last and plain and last["role"] == message["role"] and not last.get("tool_calls"):
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _arguments_as_text(messages: Messages) -> Messages:
    """Calls with their arguments as JSON text, as OpenAI sends them: some templates join them to strings."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _system_in_user(messages: Messages) -> Messages:
    """The system message at the head of the first user message: some templates know no system role."""
    if messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system["content"]}, *rest]
    told = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return [*rest[:first], told, *rest[first + 1 :]]


def _with_tools_described(messages: Messages, tools: Tools | None, description: str) -> Messages:
    """Calls and results as text, in Hermes' form, and the offered tools in the system message."""
    told: Messages = []
    for message in messages:
        if message["role"] == "tool":
            told.append({"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"})
        elif calls := message.get("tool_calls"):
            written = "\n".join(f"<tool_call>\n{_hermes_call(call)}\n</tool_call>" for call in calls)
            told.append({"role": "assistant", "content": f"{message['content']}\n{written}".strip()})
        else:
            told.append(message)
    if not tools:
        return _alternating(told)
    listed = description.replace("$$tool_list$$", "\n".join(json.dumps(tool) for tool in tools)).strip()
    return _alternating(_one_system_message([*told, {"role": "system", "content": listed}]))


def _hermes_call(call: dict[str, Any]) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def prepare(messages: Messages) -> Messages:
    """The messages as chat templates expect them; raises RequestError 400 for what no template can show."""
    return [_prepare(message, index) for index, message in enumerate(messages)]


def _prepare(message: Message, index: int) -> Message:
    """One message as chat templates expect it: text as one string, a call's arguments as an object."""
    prepared = dict(message)
    if prepared["role"] == "developer":
        prepared["role"] = "system"
    prepared["content"] = _text(message.get("content"), index)
    if calls := message.get("tool_calls"):
        prepared["tool_calls"] = [_call(call, f"messages.{index}.tool_calls.{i}") for i, call in enumerate(calls)]
    else:
        prepared.pop("tool_calls", None)
    return prepared


def _text(content: Any, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for position, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            where = f"messages.{index}.content.{position}"
            raise RequestError(400, f"{where}: only text can be read by this model", param=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(400, f"{where}: a function with a name is missing", param=where)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise RequestError(400, f"{where}.function.arguments: not JSON", param=where) from None
    return {**call, "function": {**function, "arguments": arguments}}
