"""Every key that a configuration may have, with its type: anyclaude's through its history, and ours.

The one module that imports pydantic; only commands that have read a file import it. `null` means the default, but for `fallback`.
"""

# The keys are written as the file writes them.
# ruff: noqa: N815

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from mlx_launcher.config import values


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("a text is wanted")
    return value


def _command(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    raise ValueError("a text or a list of texts is wanted")


_DURATION = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": values.DURATION_PATTERN}],
    "description": 'Milliseconds, or a text like "30s" or "5m".',
}
_SIZE = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": values.SIZE_PATTERN}],
    "description": 'Bytes, or a text like "40GB" or "16GiB".',
}
_WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

Duration = Annotated[float, BeforeValidator(values.seconds), WithJsonSchema(_DURATION)]
Size = Annotated[int, BeforeValidator(values.size), WithJsonSchema(_SIZE)]
Text = Annotated[str, BeforeValidator(_text)]
Command = Annotated[Any, BeforeValidator(_command), WithJsonSchema(_WORDS)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]


class Keys(BaseModel):
    """Strict about types; an unknown key is kept in `model_extra` for whoever wants to warn about it."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Debug(Keys):
    level: int | None = None
    enableTraces: bool | None = None
    enableStreamLogging: bool | None = None


class Peer(Keys):
    host: Text | None = None
    memory_gb: float | None = None


class Distributed(Keys):
    enabled: bool | None = None
    peers: list[Peer] | None = None
    strategy: Text | None = None
    connection: Text | None = None
    local_memory_gb: float | None = None


class Cache(Keys):
    enable_cache: bool | None = Field(None, description="Keep the KV cache of prompts on disk.")
    cache_slots: Positive | None = Field(None, description="How many prompts to keep.")
    min_tokens_for_cache: Count | None = Field(None, description="Shorter prompts are not kept.")
    dir: Text | None = Field(None, description="Where to keep them instead of in the state directory.")
    maxBytes: Size | None = Field(None, description="The most that the KV cache may take on disk.")
    memoryBytes: Size | None = Field(None, description="The most that it may take in memory.")


class Restart(Keys):
    maxRestarts: Count | None = Field(None, description="More crashes than this in `window` are a crash loop.")
    window: Duration | None = None
    backoff: Duration | None = None
    backoffMax: Duration | None = None


class Warmup(Keys):
    promptFiles: list[Text] | None = None


class Block(Keys):
    """One backend: anyclaude's keys, then ours."""

    enabled: bool | None = None
    description: Text | None = None
    port: Port | None = Field(None, description="The port to listen on; else that of `baseUrl`.")
    baseUrl: Text | None = Field(None, description="What anyclaude connects to.")
    apiKey: Text | None = None
    model: Text | None = Field(None, description="The name that clients send; a path or org/name is served too.")
    modelPath: Text | None = Field(None, description="The model: a directory or org/name.")
    maxTokens: Count | None = None
    serverScript: Text | None = Field(None, description="A server of yours, called as anyclaude does.")
    compatibility: Text | None = None
    autoStartServer: bool | None = None
    startupTimeout: Count | None = Field(None, description="Milliseconds; anyclaude's own patience.")
    distributed: Distributed | None = None
    cache: Cache | None = None
    truncateSystemPrompt: bool | None = None
    systemPromptMaxTokens: Count | None = None
    smartSystemPrompt: bool | None = None
    smartPromptMode: Text | None = None
    safeSystemFilter: bool | None = None
    filterTier: Text | None = None
    stubToolDescriptions: bool | None = None
    toolAllowlist: list[Text] | None = None
    localSearch: bool | None = None

    fallback: Text | None = Field(None, description="The backend that takes over when this one fails; null is none.")
    stopTimeout: Duration | None = None
    hangTimeout: Duration | None = None
    freezeTimeout: Duration | None = None
    idleTimeout: Duration | None = None
    restart: Restart | None = None
    warmup: Warmup | None = None
    standby: bool | None = None
    maxQueue: Positive | None = None
    memoryLimit: Size | None = None
    command: Command | None = Field(None, description="A server of yours; {model} {port} {host} {url} are filled in.")
    env: dict[str, Text] | None = Field(None, description="Environment variables of the server.")
    host: Text | None = Field(None, description="The address to listen on.")
    acceptAnyModel: bool | None = None
    requireKey: bool | None = None
    metricsPort: Port | None = None


class Cluster(Keys):
    """anyclaude's cluster of several machines: known, and not served here."""

    enabled: bool | None = None
    description: Text | None = None
    discovery: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None


class Top(Keys):
    """What stands beside the backends."""

    backend: Text | None = Field(None, description="The backend to start when no other is asked for.")
    pythonVenv: Text | None = Field(None, description="The virtual environment of your own Python scripts.")
    debug: Debug | None = None
    webSearch: dict[str, Any] | None = None
    circuitBreaker: dict[str, Any] | None = None
    port: Port | None = Field(None, description="The port of anyclaude's own proxy.")


class Configuration(Top):
    """.anyclauderc.json, for anyclaude and mlx-launch."""

    backends: dict[str, Block] | None = None


def block_type(name: str) -> type[Keys]:
    return Cluster if name == "mlx-cluster" else Block


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors; unknown keys are allowed, as comments are keys."""
    schema = Configuration.model_json_schema()
    _drop_titles(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": ".anyclauderc.json", **schema}


def _drop_titles(node: Any) -> None:
    """pydantic titles every key with its own name in other letters."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        for part in node.values():
            _drop_titles(part)
    elif isinstance(node, list):
        for part in node:
            _drop_titles(part)
