"""The model's states: the last ones in memory, and the entries on disk behind them.

A follow-up of what is in memory costs its new tokens. What is new is written when nobody waits for an answer.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from mlx_launcher.host.kvfiles import (
    State,
    is_plain,
    plain_state,
    plain_tensors,
    state_bytes,
    whole_state,
    whole_tensors,
)
from mlx_launcher.kvcache.files import verify
from mlx_launcher.kvcache.store import MIN_FREE_BYTES, Match, Store
from mlx_launcher.kvcache.tree import WIDTH, common_prefix, pack

log = logging.getLogger("mlx_launcher.host")

# A state may be taken over by a prompt that leaves off so little of its end, in tokens and as a share; else a copy is gone on
# from, and both stay.
SHORT_TAIL = 256
SHORT_TAIL_SHARE = 4
# Fewer new tokens are written only when the server ends: running them again takes less than a file.
MIN_NEW = 32
# One write at most, so that a request which comes meanwhile waits for no more: about 50 ms on an SSD of 1.3 GB/s.
STEP_BYTES = 64 << 20
# A whole state is written again with every turn, so only when the conversation seems to rest.
REST_S = 10.0
# After a write that failed: a disk that is full now is likely full in a second.
RETRY_S = 30.0


@dataclass(eq=False)
class _Hot:
    """A state that holds exactly `tokens`."""

    tokens: bytes
    state: State
    size: int
    kept_at: float
    saved: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens) // WIDTH


class KVStates:
    """Restores and keeps states of one model, at most `memory_bytes` of them in memory; prompts below `min_tokens` are not kept.

    `store` None: nothing is on disk, for the reason in `problem`, if there is one. Called on the engine's thread, but for
    `summary`.
    """

    def __init__(
        self,
        make_empty: Callable[[], State],
        store: Store | None,
        memory_bytes: int,
        min_tokens: int,
        problem: str | None = None,
    ) -> None:
        self._make_empty = make_empty
        self._store = store
        self._memory_bytes = memory_bytes
        self._min_tokens = max(min_tokens, 1)
        self._problem = problem
        self._hot: list[_Hot] = []  # the most recently used one last
        self._retry_at = 0.0

    def restore(self, tokens: Sequence[int]) -> tuple[State, int]:
        """A state to go on from, and how many of the prompt's tokens it holds already: 0 to all but one."""
        hot, shared = self._hottest(pack(tokens))
        while self._store and (match := self._store.find(tokens)) and match.usable > shared:
            try:
                return self._read(match), match.usable
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                self._put_aside(self._store, match, error)
        if hot is not None:
            return self._take(hot, shared), shared
        return self._make_empty(), 0

    def keep(self, state: State, tokens: Sequence[int]) -> None:
        """Keeps a state that holds exactly `tokens`, for now in memory."""
        if len(tokens) < self._min_tokens:
            return
        packed = pack(tokens)
        self._hot = [hot for hot in self._hot if not _serves_instead(packed, hot)]
        self._hot.append(_Hot(packed, state, state_bytes(state), time.monotonic()))

    def evict(self) -> None:
        """Takes out of memory what is too much for it, once it is written."""
        while sum(hot.size for hot in self._hot) > self._memory_bytes and self._hot:
            self._write_all(self._hot[0], MIN_NEW)
            del self._hot[0]

    def save(self) -> float | None:
        """Writes at most one piece of what is only in memory; seconds until there is more to do, None for nothing more."""
        now = time.monotonic()
        if self._store is None or now < self._retry_at:
            return None if self._store is None else self._retry_at - now
        rest = None
        for hot in self._hot:
            if hot.saved:
                continue
            wait = 0.0 if is_plain(hot.state) else hot.kept_at + REST_S - now
            if wait > 0:
                rest = min(wait, rest or wait)
            elif self._write(hot, MIN_NEW):
                return 0.0
            elif now < self._retry_at:
                return RETRY_S
        return rest

    def flush(self) -> None:
        """Writes all that is only in memory, as far as there are places on disk for it: the server ends."""
        slots = self._store.limits.slots if self._store else 0
        for hot in self._hot[-slots:] if slots else []:
            self._write_all(hot, 1)

    def summary(self) -> dict[str, Any] | None:
        """What `status` shows."""
        in_memory = {"memory_bytes": sum(hot.size for hot in list(self._hot)), "problem": self._problem}
        if self._store is None:
            return in_memory if self._memory_bytes else None
        return {**self._store.summary(), **in_memory}

    # -- in memory

    def _hottest(self, wanted: bytes) -> tuple[_Hot | None, int]:
        # As on disk: what saves a handful of tokens is not worth a copy.
        best: tuple[_Hot | None, int] = None, self._min_tokens - 1
        room = len(wanted) // WIDTH - 1
        for hot in self._hot:
            shared = min(common_prefix(hot.tokens, wanted), room)
            if (is_plain(hot.state) or shared == hot.length) and shared > best[1]:
                best = hot, shared
        return best if best[0] is not None else (None, 0)

    def _take(self, hot: _Hot, shared: int) -> State:
        self._hot.remove(hot)
        if not is_plain(hot.state):
            self._hot.append(hot)
            # Arrays are shared until one of them is written to.
            return copy.deepcopy(hot.state)
        tail = hot.length - shared
        if tail <= min(SHORT_TAIL, hot.length // SHORT_TAIL_SHARE):
            trim_prompt_cache(hot.state, tail)
            return hot.state
        self._hot.append(hot)
        return [_prefix(layer, shared) for layer in hot.state]

    # -- on disk

    def _read(self, match: Match) -> State:
        segment = match.segment
        for part in segment.line():
            # Once: a disk that gives back other bytes than it was given would else be believed.
            if not part.verified:
                verify(part.path)
                part.verified = True
        state = (
            whole_state(segment)
            if segment.whole
            else plain_state(len(self._make_empty()), segment.line(), match.usable)
        )
        mx.eval([layer.state for layer in state if not layer.empty()])
        return state

    def _put_aside(self, store: Store, match: Match, error: Exception) -> None:
        line = match.segment.line()
        # Which file of the line it was is not told by every error: the first that is not what was written, else the last.
        broken = next((segment for segment in line if not _is_whole(segment.path)), match.segment)
        log.warning("a KV cache entry cannot be read and is set aside: %s: %s", broken.path.name, error)
        store.set_aside(broken)

    def _write_all(self, hot: _Hot, min_new: int) -> None:
        while time.monotonic() >= self._retry_at and self._write(hot, min_new):
            pass

    def _write(self, hot: _Hot, min_new: int) -> bool:
        """Writes one piece; False where nothing was left to write, or it could not be."""
        store = self._store
        if store is None:
            return False
        tokens = memoryview(hot.tokens).cast("i").tolist()
        try:
            if is_plain(hot.state):
                return self._write_new(store, hot, tokens, min_new)
            hot.saved = True
            if store.has_whole(tokens):
                return False
            tensors, metadata = whole_tensors(hot.state)
            room = store.add_whole(tokens, tensors, metadata)
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            hot.saved = False
            self._tell(f"the KV cache is not saved: {error.strerror or error}")
            return False
        self._tell(None if room else _no_room(store))
        return room

    def _write_new(self, store: Store, hot: _Hot, tokens: list[int], min_new: int) -> bool:
        after = store.held(tokens)
        start = after.usable if after else 0
        if len(tokens) - start < min_new:
            hot.saved = True
            return False
        per_token = hot.size / max(hot.state[0].keys.shape[2], 1)
        # A first piece below the store's least length would not be found again, and written for ever.
        step = max(256, store.limits.min_tokens, int(STEP_BYTES / per_token))
        end = min(len(tokens), start + step)
        room = store.add(after, tokens[start:end], plain_tensors(hot.state, start, end))
        hot.saved = end == len(tokens) or not room
        self._tell(None if room else _no_room(store))
        return room

    def _tell(self, problem: str | None) -> None:
        if problem and problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem


def _no_room(store: Store) -> str:
    return (
        f"the KV cache is not saved: {store.directory.parent} has no room for this conversation: cache.maxBytes is "
        f"{store.limits.max_bytes} bytes, and {MIN_FREE_BYTES} bytes of the disk stay free for others"
    )


def _serves_instead(packed: bytes, hot: _Hot) -> bool:
    """Whether a state of these tokens serves every prompt that `hot` serves."""
    return packed.startswith(hot.tokens) and (is_plain(hot.state) or len(packed) == len(hot.tokens))


def snapshot(state: State) -> State:
    """A copy that stays as it is while the original goes on. Arrays are shared until one of them is written to."""
    return copy.deepcopy(state)


def _prefix(layer: KVCache, length: int) -> KVCache:
    prefix = KVCache()
    prefix.state = (layer.keys[..., :length, :], layer.values[..., :length, :], length)
    return prefix


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except (OSError, ValueError):
        return False
    return True
