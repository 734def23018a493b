"""Turns OpenAI's messages into the prompt text of the model's own chat template."""

import json
from typing import Any

from mlx_launcher.host.errors import RequestError

Messages = list[dict[str, Any]]


def render(tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None) -> str:
    """The prompt up to where the model goes on; a last assistant message is continued.

    Raises RequestError 400 with the template's own words where it refuses these messages.
    """
    prepared = [_prepare(message, index) for index, message in enumerate(messages)]
    continues = prepared[-1]["role"] == "assistant" and not prepared[-1].get("tool_calls")
    try:
        return str(
            tokenizer.apply_chat_template(
                prepared,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
            )
        )
    except Exception as error:
        # Templates raise whatever they like, most often jinja2's TemplateError with a sentence about roles.
        raise RequestError(
            400, f"the model's chat template refuses these messages: {error}", param="messages"
        ) from None


def _prepare(message: dict[str, Any], index: int) -> dict[str, Any]:
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
