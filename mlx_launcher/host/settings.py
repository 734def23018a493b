"""What `activate` carries: everything a host has to know, resolved by the command."""

from typing import TypedDict


class CacheSettings(TypedDict):
    """The KV cache: on disk, the legacy server's in memory. `slots`: entries kept, least recently used out first.

    On disk alone: `dir`, and `min_tokens`: shorter prompts are not kept. In memory alone: `memory_bytes`; None is a share of
    the machine's memory.
    """

    enabled: bool
    dir: str
    slots: int
    min_tokens: int
    memory_bytes: int | None


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
    cache: CacheSettings
