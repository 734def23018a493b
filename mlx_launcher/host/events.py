"""What a generation yields, in order: Started, then Text and Call, then Ended, for each answer of a request."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """The prompt is tokenized; `cached_tokens` of its `prompt_tokens` came from the KV cache. The prefill begins."""

    index: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Text:
    """A piece of text; with `logprobs` there is one for each token, and its text may be empty."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    reasoning: bool = False  # what the model thought before it answered, where its format tells


@dataclass(frozen=True)
class Call:
    """One whole tool call; `arguments` is JSON text."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Ended:
    """`reason` is OpenAI's finish_reason: "stop", "length" or "tool_calls"."""

    index: int
    reason: str
    completion_tokens: int


Event = Started | Text | Call | Ended
