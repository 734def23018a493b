"""Between the model's state in memory and the entries on disk."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

from mlx_launcher.kvcache.store import Store

log = logging.getLogger("mlx_launcher.host")

State = list[Any]  # mlx-lm's caches, one for each layer


class KVStates:
    """Restores and keeps states of one model; without a store every prompt is run whole."""

    def __init__(self, make_empty: Any, store: Store | None) -> None:
        self._make_empty = make_empty
        self._store = store

    def restore(self, tokens: Sequence[int]) -> tuple[State, int]:
        """A state to go on from, and how many of the prompt's tokens it holds already: 0 to all but one."""
        while self._store and (found := self._store.find(tokens)):
            entry, usable = found
            try:
                state = load_prompt_cache(str(entry.path))
                trim = entry.length - usable
                if trim:
                    trim_prompt_cache(state, trim)
                mx.eval([layer.state for layer in state if not layer.empty()])
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
                log.warning("a KV cache entry cannot be read and is set aside: %s: %s", entry.path.name, error)
                self._store.set_aside(entry)
                continue
            return state, usable
        return self._make_empty(), 0

    def keep(self, state: State, tokens: Sequence[int]) -> None:
        """Keeps a state that holds exactly `tokens`. A disk that does not take it costs the next request its speed only."""
        if self._store is None:
            return

        def write(path: Path) -> None:
            try:
                for layer in state:
                    _drop_spare_room(layer)
                save_prompt_cache(
                    str(path), state, {"tokens": " ".join(map(str, tokens)), "trimmable": str(int(trimmable))}
                )
            except RuntimeError as error:  # mlx reports a failed write so
                raise OSError(str(error)) from error

        trimmable = can_trim_prompt_cache(state)
        try:
            self._store.add(tokens, trimmable, write)
        except OSError as error:
            log.warning("the KV cache was not saved: %s", error)

    def summary(self) -> dict[str, Any] | None:
        return self._store.summary() if self._store else None


def is_plain(state: State) -> bool:
    """Whether any prefix can be had from a state later: else it has to be copied at the point that the next turn starts from."""
    return all(type(layer) is KVCache for layer in state)


def snapshot(state: State) -> State:
    """A copy that stays as it is while the original goes on. Arrays are shared until one of them is written to."""
    return copy.deepcopy(state)


def _drop_spare_room(layer: Any) -> None:
    """mlx-lm allocates 256 tokens at a time; what lies beyond the last one would be written too."""
    if type(layer) is KVCache and layer.keys is not None:
        layer.state = (layer.keys[..., : layer.offset, :], layer.values[..., : layer.offset, :], layer.offset)
