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

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Debug(Keys):
    level: int | None = None
    enableTraces: bool | None = None
    enableStreamLogging: bool | None = None


class Peer(Keys):
    host: Text | None = Field(None, description="What ssh is told: an address, or a name that has one.")
    memory_gb: float | None = None


class Distributed(Keys):
    enabled: bool | None = Field(None, description="Serve on several machines as one.")
    peers: list[Peer] | None = Field(None, description="The other machines.")
    strategy: Text | None = Field(None, description="How the model is split: auto, tensor or pipeline.")
    connection: Text | None = Field(None, description="How MLX connects them: auto, ring (TCP) or jaccl (RDMA).")
    local_memory_gb: float | None = None
    hostFile: Text | None = Field(
        None, description="A host file of MLX, instead of `peers`; this machine is its first."
    )
    port: Port | None = Field(None, description="The first of MLX's own ports, one for each address.")
    python: Text | None = Field(None, description="The interpreter on the other machines. Default: the one here.")
    sshOptions: list[Text] | None = Field(None, description="What ssh is told besides, as words.")


class Node(Keys):
    id: Text | None = None
    url: Text | None = Field(None, description="Its host is a machine of the cluster; nothing else of it is used.")


class Discovery(Keys):
    mode: Text | None = None
    nodes: list[Node] | None = Field(None, description="All machines; used where there are no `distributed.peers`.")


class Cache(Keys):
    enable_cache: bool | None = Field(None, description="Keep anything at all.")
    cache_slots: Positive | None = Field(None, description="Conversations kept for a model.")
    min_tokens_for_cache: Count | None = Field(None, description="Shorter prompts are not kept.")
    dir: Text | None = Field(
        None,
        description="Where; models share it, each in folders of its own. Default: `kvcache` in the state directory.",
    )
    maxBytes: Size | None = Field(
        None,
        description="What all models together may take there; the least recently used goes first. Default: 40 GB, or a "
        "quarter of the free disk if that is less.",
    )
    memoryBytes: Size | None = Field(
        None,
        description="What may stay in memory, where a follow-up needs no disk. Default: an eighth of the machine's "
        "memory.",
    )


class Restart(Keys):
    maxRestarts: Count | None = Field(None, description="More crashes than this within `window` are a crash loop.")
    window: Duration | None = Field(None, description="How long a crash counts.")
    backoff: Duration | None = Field(
        None,
        description="The pause before the second restart; doubled with each further one.",
    )
    backoffMax: Duration | None = Field(None, description="The longest pause.")


class Warmup(Keys):
    promptFiles: list[Text] | None = Field(None, description="Captured requests to be run before somebody asks.")


class Block(Keys):
    """One backend: anyclaude's keys, then ours."""

    enabled: bool | None = Field(
        None,
        description="`false` takes the block out of the choice where no backend is named; `--mode` starts it all the "
        "same.",
    )
    description: Text | None = None
    port: Port | None = Field(
        None,
        description="The port to listen on; must agree with `baseUrl`. Default: that of `baseUrl`, else 8081.",
    )
    baseUrl: Text | None = Field(
        None,
        description="What anyclaude connects to: `http://localhost:PORT/v1`. Another machine is an error.",
    )
    apiKey: Text | None = Field(None, description="Accepted on loopback, demanded beyond it. Default: none.")
    apiKeyFile: Text | None = Field(
        None,
        description="A file that holds the key and nothing else, instead of `apiKey`. It must be yours and `chmod 600`. "
        "The environment goes before both; anyclaude does not know it. Default: none.",
    )
    model: Text | None = Field(
        None,
        description="The name that clients send. The server also answers to the directory's name, its short form and its "
        "path. Default: `modelPath`.",
    )
    modelPath: Text | None = Field(
        None,
        description="The model: a directory, or `org/name` on the hub. Default: `model`, where that is a path or "
        "`org/name`.",
    )
    maxTokens: Count | None = None
    serverScript: Text | None = Field(
        None,
        description="A server of your own, called as anyclaude does. Default: none.",
    )
    compatibility: Text | None = None
    autoStartServer: bool | None = None
    startupTimeout: Count | None = Field(
        None,
        description="Milliseconds; anyclaude's patience. mlx-launch waits as long as it takes, or `start --timeout`.",
    )
    distributed: Distributed | None = Field(None, description="Several machines as one server.")
    cache: Cache | None = Field(None, description="The KV cache. The legacy server's is in memory alone.")
    truncateSystemPrompt: bool | None = None
    systemPromptMaxTokens: Count | None = None
    smartSystemPrompt: bool | None = None
    smartPromptMode: Text | None = None
    safeSystemFilter: bool | None = None
    filterTier: Text | None = None
    stubToolDescriptions: bool | None = None
    toolAllowlist: list[Text] | None = None
    localSearch: bool | None = None

    fallback: Text | None = Field(
        None,
        description="The backend that takes over when this one fails; it keeps this one's port, model and key. `null` is "
        "none.",
    )
    stopTimeout: Duration | None = Field(None, description="How long a server may take to end before it is killed.")
    hangTimeout: Duration | None = Field(
        None,
        description="Work in flight, or a start, without progress for this long is a hang.",
    )
    freezeTimeout: Duration | None = Field(
        None,
        description="No sign of life and no use of the processor for this long is a freeze.",
    )
    idleTimeout: Duration | None = Field(
        None,
        description="Unload the model after this long without work; the next connection loads it again, and waits "
        "meanwhile. 0 is never. Not for a server of your own.",
    )
    restart: Restart | None = Field(
        None,
        description="How many crashes are borne, and how long the pauses after them are.",
    )
    warmup: Warmup | None = Field(None, description="What to compute before somebody asks.")
    standby: bool | None = Field(
        None,
        description="A second process that has imported everything waits, without a model, to take over after a crash; "
        "`status` shows its memory. Not for a server of your own.",
    )
    maxQueue: Positive | None = Field(None, description="Requests that may wait; more get 429.")
    memoryLimit: Size | None = Field(
        None,
        description="A server that uses more memory than this finishes what is in flight and is restarted; a server of "
        "your own is not watched. Default: none.",
    )
    command: Command | None = Field(
        None,
        description="A server of your own, started by this and not by `serverScript`: a list of words, or a text. "
        "`{model}`, `{port}`, `{host}`, `{url}` and `{state_dir}` are filled in. Default: none.",
    )
    env: dict[str, Text] | None = Field(None, description="Environment variables of the server, texts by name.")
    host: Text | None = Field(
        None,
        description="The address to listen on. `127.0.0.1` means both loopback addresses; one that others can reach "
        "needs a key.",
    )
    acceptAnyModel: bool | None = Field(None, description="Answer whatever model a request names.")
    requireKey: bool | None = Field(None, description="Demand `apiKey` on loopback too.")
    metricsPort: Port | None = Field(
        None,
        description="Answer `http://127.0.0.1:METRICSPORT/metrics`, on loopback alone, with OpenMetrics for a monitoring system. "
        "The supervisor does, so that nothing idle is woken. Default: none.",
    )


class ClusterCache(Cache):
    maxCacheAgeSec: float | None = None
    minCacheHitRate: float | None = None
    maxCacheSizeTokens: float | None = None


class Cluster(Block):
    """The block `mlx-cluster`. anyclaude sends each request to one of its nodes; here they are one server."""

    discovery: Discovery | None = None
    health: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    cache: ClusterCache | None = None


class Top(Keys):
    """What stands beside the backends."""

    backend: Text | None = Field(None, description="The backend to start when no other is asked for.")
    pythonVenv: Text | None = Field(None, description="The virtual environment that your own Python scripts run in.")
    debug: Debug | None = None
    webSearch: dict[str, Any] | None = None
    circuitBreaker: dict[str, Any] | None = None
    port: Port | None = Field(None, description="The port of anyclaude's own proxy; not used here.")


class Configuration(Top):
    """.anyclauderc.json, for anyclaude and mlx-launch."""

    backends: dict[str, Block] | None = Field(None, description="The backends' blocks, by name.")


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
