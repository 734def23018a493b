"""What `activate` carries: everything a host has to know, resolved by the command."""

from typing import NotRequired, TypedDict


class CacheSettings(TypedDict):
    """The KV cache: in memory and, but for the legacy server's, on disk. `slots`: entries kept, least recently used out first.

    `memory_bytes`: in memory; None is a share of the machine's memory. On disk alone: `dir`; `max_bytes`, of all models
    together, None is a share of the free disk; `min_tokens`: shorter prompts are not kept.
    """

    enabled: bool
    dir: str
    slots: int
    min_tokens: int
    memory_bytes: int | None
    max_bytes: int | None


class Membership(TypedDict):
    """A rank's `settings["cluster"]`. `files` are written for MLX, by the name of the environment variable that names each."""

    rank: int
    size: int
    strategy: str  # "tensor" or "pipeline"
    link: str  # MLX's name of the backend: "ring" or "jaccl"
    environment: dict[str, str]
    files: dict[str, str]


class Settings(TypedDict):
    """`names` are what the model answers to; `model_id` is the one it calls itself. Sizes are bytes."""

    model_path: str
    model_id: str
    names: list[str]
    accept_any_model: bool
    api_key: str | None
    require_key: bool
    max_queue: int
    max_body_bytes: int
    prefill_batch: int
    warmup: list[str]  # files with a request's body each, to be run through the model before somebody asks
    cache: CacheSettings
    cluster: NotRequired[Membership]  # of a rank
