"""The states in memory, and how they come to the disk."""

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_launcher.host import kvstate
from mlx_launcher.host.kvfiles import State
from mlx_launcher.host.kvstate import RETRY_S, KVStates
from mlx_launcher.kvcache.store import MIN_FREE_BYTES, Limits, Store

Usage = namedtuple("Usage", "total used free")


def read(layer: KVCache | RotatingKVCache, tokens: int) -> State:
    layer.update_and_fetch(mx.zeros((1, 1, tokens, 4)), mx.zeros((1, 1, tokens, 4)))
    return [layer]


def plain(tokens: int) -> State:
    return read(KVCache(), tokens)


def sliding(tokens: int) -> State:
    return read(RotatingKVCache(max_size=64), tokens)


@pytest.fixture
def states(tmp_path: Path) -> Callable[..., tuple[KVStates, Store]]:
    def make(min_tokens: int = 1) -> tuple[KVStates, Store]:
        store = Store(tmp_path / "model", Limits(slots=10, min_tokens=min_tokens, max_bytes=1 << 40))
        return KVStates(lambda: [KVCache()], store, 1 << 40, min_tokens), store

    return make


def test_a_piece_is_never_shorter_than_what_the_store_finds_again(states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstate, "STEP_BYTES", 1)
    kept, store = states(min_tokens=1000)
    kept.keep(plain(2500), list(range(2500)))
    assert [kept.save() for _ in range(4)] == [0.0, 0.0, 0.0, None]
    assert store.summary()["entries"] == 1
    assert kept.restore(list(range(2600)))[1] == 2500


def test_a_write_that_failed_is_tried_again_though_nobody_asks(states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, store = states()
    for number in range(2):
        kept.keep(plain(300), [number] * 300)
    tried = []

    def full(*given: Any) -> bool:
        tried.append(given)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "add", full)
    assert kept.save() == RETRY_S
    assert 0 < kept.save() <= RETRY_S
    assert len(tried) == 1, "the other state goes to the same disk"
    assert "No space left" in kept.summary()["problem"]


@pytest.mark.parametrize("made", [plain, sliding])
def test_a_prompt_that_comes_again_is_in_memory_once(states: Any, made: Callable[[int], State]) -> None:
    kept, _ = states()
    for _ in range(3):
        kept.keep(made(50), list(range(50)))
    assert kept.summary()["memory_bytes"] == sum(array.nbytes for array in made(50)[0].state[:2])


def test_what_cannot_be_cut_is_kept_beside_what_goes_on_from_it(states: Any) -> None:
    kept, _ = states()
    kept.keep(sliding(50), list(range(50)))
    kept.keep(sliding(60), list(range(60)))
    assert kept.restore([*range(50), 7])[1] == 50


@pytest.mark.parametrize("layer", [KVCache, lambda: RotatingKVCache(max_size=64)])
def test_a_state_of_nothing_is_not_kept(states: Any, layer: Callable[[], Any]) -> None:
    kept, store = states(min_tokens=0)
    kept.keep([layer()], [])
    kept.flush()
    assert store.summary()["entries"] == 0


def test_a_disk_that_others_filled_is_not_taken_for_a_bound_that_is_too_low(
    states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, store = states()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    kept.keep(plain(300), list(range(300)))
    kept.save()
    problem = kept.summary()["problem"]
    assert str(store.directory.parent) in problem
    assert f"{MIN_FREE_BYTES} bytes of the disk" in problem
