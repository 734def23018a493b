"""What a client may ask: OpenAI's request bodies, checked, and turned into one Generation for the engine."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_launcher.host.errors import RequestError


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Guide:
    """What the whole answer has to follow: a JSON schema, a regex, a list of choices or a Lark grammar."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any


@dataclass(frozen=True)
class Generation:
    """One request for the engine: text `prompts`, or `messages` for the chat template, each answered `n` times.

    `callable_tools` are those that the answer may call; `must_call` leaves it no other way, `single_call` allows one call only.
    `max_tokens` None: as long as the default and the model's context allow.
    """

    prompts: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    callable_tools: list[Tool] = field(default_factory=list)
    must_call: bool = False
    single_call: bool = False
    n: int = 1
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    guide: Guide | None = None
    top_logprobs: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _Common(_Strict):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(gt=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    guided_json: dict[str, Any] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None


class CompletionBody(_Common):
    prompt: str | Annotated[list[str], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Function(_Strict):
    name: Annotated[str, Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function


class _ChoiceFunction(_Strict):
    name: str


class _Choice(_Strict):
    type: Literal["function"]
    function: _ChoiceFunction


class _JsonSchema(_Strict):
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class _ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class ChatBody(_Common):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: _ResponseFormat | None = None


Body = TypeVar("Body", bound=_Common)


def parse(raw: bytes, body: type[Body]) -> tuple[Body, dict[str, Any]]:
    """A request's JSON, checked and as it came; raises RequestError 400 that names the part at fault."""
    try:
        document = _whole_characters(json.loads(raw.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="bad_json") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object", code="bad_json")
    try:
        return body.model_validate(document), document
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise RequestError(400, f"{where}: {first['msg']}", param=where, code="bad_value") from None


def _whole_characters(document: Any) -> Any:
    """The document with U+FFFD for each half of a character: clients that count in UTF-16 cut a text within an emoji and send
    it so in every further turn, and no tokenizer takes it.
    """
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return document


def parse_completion(raw: bytes) -> tuple[CompletionBody, Generation]:
    """`/v1/completions`: the body, and the engine's view of it; raises RequestError 400."""
    body, _ = parse(raw, CompletionBody)
    return body, Generation(
        prompts=[body.prompt] if isinstance(body.prompt, str) else body.prompt,
        top_logprobs=body.logprobs,
        max_tokens=body.max_tokens,
        guide=_guide(body),
        **_shared(body),
    )


def parse_chat(raw: bytes) -> tuple[ChatBody, Generation]:
    """`/v1/chat/completions`: the body, and the engine's view of it, whose messages and tools are as they came, because the
    chat template shows them whole; raises RequestError 400.
    """
    body, document = parse(raw, ChatBody)
    choice = body.tool_choice if body.tool_choice is not None else "auto"
    offered = [Tool(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in body.tools or []]
    guide = _guide(body)
    if isinstance(choice, _Choice):
        named = [tool for tool in offered if tool.name == choice.function.name]
        if not named:
            raise RequestError(
                400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice"
            )
        offered_calls, must_call = named, True
    else:
        offered_calls, must_call = ([] if choice == "none" else offered), choice == "required"
    if must_call and not offered:
        raise RequestError(400, "tool_choice requires a call, but there are no tools", param="tool_choice")
    if must_call and guide:
        raise RequestError(400, "a required tool call and a guided answer exclude each other", param="tool_choice")
    return body, Generation(
        messages=document["messages"],
        tools=document["tools"] if offered and choice != "none" else None,
        callable_tools=offered_calls,
        must_call=must_call,
        single_call=body.parallel_tool_calls is False,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        guide=guide,
        **_shared(body),
    )


def check_logit_bias(request: Generation, vocabulary: int) -> None:
    """RequestError 400 for a token that the model does not have: MLX would write beside the logits."""
    if any(not 0 <= token < vocabulary for token in request.sampling.get("logit_bias", ())):
        raise RequestError(400, f"logit_bias: this model's tokens are 0 to {vocabulary - 1}", param="logit_bias")


def _shared(body: _Common) -> dict[str, Any]:
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
    )
    sampling = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        # mlx takes an unsigned number of 64 bits.
        sampling["seed"] = body.seed % 2**64
    if body.logit_bias:
        try:
            sampling["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
        except ValueError:
            raise RequestError(400, "logit_bias: its keys must be token ids", param="logit_bias") from None
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {"sampling": sampling, "stop": stop, "n": body.n or 1}


def _guide(body: _Common) -> Guide | None:
    guides: list[Guide] = []
    for kind in ("json", "choice", "regex", "grammar"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            guides.append(Guide(kind, value))
    response_format = getattr(body, "response_format", None)
    if response_format and response_format.type == "json_object":
        guides.append(Guide("json", {"type": "object"}))
    elif response_format and response_format.type == "json_schema":
        if response_format.json_schema is None or response_format.json_schema.schema_ is None:
            raise RequestError(400, "response_format.json_schema.schema is missing", param="response_format")
        guides.append(Guide("json", response_format.json_schema.schema_))
    if len(guides) > 1:
        raise RequestError(400, "only one of response_format and the guided_… parameters can be used at a time")
    return guides[0] if guides else None
