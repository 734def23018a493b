import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.kvcache.store import Store, common_prefix, pack


def entry_file(tokens: Sequence[int], trimmable: bool) -> bytes:
    """A whole entry with one small tensor, and metadata as mlx-lm writes it."""
    metadata = {"0.tokens": " ".join(map(str, tokens)), "0.trimmable": str(int(trimmable))}
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"__metadata__": metadata, "x": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


def writer(tokens: Sequence[int], trimmable: bool = True) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(entry_file(tokens, trimmable))

    return write


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kvcache"


def kept(store: Store, tokens: Sequence[int], trimmable: bool = True) -> None:
    store.add(tokens, trimmable, writer(tokens, trimmable))


def usable(store: Store, tokens: Sequence[int]) -> int:
    found = store.find(tokens)
    return found[1] if found else 0


def numbers(*ranges: tuple[int, int]) -> list[int]:
    return [number for start, end in ranges for number in range(start, end)]


def test_the_longest_match_wins_and_one_token_is_always_left_to_run(directory: Path) -> None:
    store = Store(directory, slots=10, min_tokens=1)
    kept(store, numbers((0, 1000), (5000, 6000)))
    kept(store, numbers((0, 2000)))
    assert usable(store, numbers((0, 3000))) == 2000
    assert usable(store, numbers((0, 1000), (5000, 5500), (9000, 9100))) == 1500
    assert usable(store, numbers((0, 2000))) == 1999
    assert usable(store, numbers((7, 100))) == 0


def test_what_cannot_be_trimmed_serves_only_as_a_whole(directory: Path) -> None:
    store = Store(directory, slots=10, min_tokens=1)
    kept(store, numbers((0, 500)), trimmable=False)
    assert usable(store, numbers((0, 400))) == 0
    assert usable(store, numbers((0, 500))) == 0
    assert usable(store, numbers((0, 501))) == 500
    # The shorter one is worth keeping beside the longer one: it cannot be had from it.
    kept(store, numbers((0, 800)), trimmable=False)
    assert usable(store, numbers((0, 600))) == 500


def test_a_match_of_a_handful_of_tokens_is_not_worth_reading(directory: Path) -> None:
    store = Store(directory, slots=10, min_tokens=100)
    kept(store, numbers((0, 500)))
    assert usable(store, numbers((0, 99), (9000, 9500))) == 0
    assert usable(store, numbers((0, 100), (9000, 9500))) == 100


def test_a_successor_finds_everything_by_itself(directory: Path) -> None:
    kept(Store(directory, slots=10, min_tokens=1), numbers((0, 300)))
    assert usable(Store(directory, slots=10, min_tokens=1), numbers((0, 400))) == 300


def test_a_longer_turn_takes_the_place_of_the_shorter_and_what_is_alike_is_not_written(directory: Path) -> None:
    store = Store(directory, slots=10, min_tokens=1)
    kept(store, numbers((0, 1000)))
    kept(store, numbers((0, 1500)))
    assert store.summary()["entries"] == 1
    store.add(numbers((0, 1490), (9000, 9005)), True, lambda path: pytest.fail("written"))
    assert len(list(directory.iterdir())) == 1


def test_the_least_recently_used_goes_first_also_after_a_restart(directory: Path) -> None:
    store = Store(directory, slots=3, min_tokens=1)
    for number, used in ((1, 30), (2, 10), (3, 20)):
        kept(store, [number] * 50)
        path = store.find([number] * 51)
        assert path
        os.utime(path[0].path, (used, used))
    store = Store(directory, slots=3, min_tokens=1)
    kept(store, [4] * 50)
    assert [usable(store, [number] * 51) for number in (1, 2, 3, 4)] == [50, 0, 50, 50]


def test_short_prompts_are_not_kept(directory: Path) -> None:
    store = Store(directory, slots=3, min_tokens=100)
    kept(store, [1] * 99)
    assert store.summary() == {"dir": str(directory), "entries": 0, "bytes": 0, "limit_bytes": None}


WHOLE = entry_file([1, 2], True)


@pytest.mark.parametrize("content", [b"", bytes(100), WHOLE[:-1], WHOLE.replace(b"0.tok", b"1.tok")])
def test_what_is_torn_is_set_aside_at_start(directory: Path, content: bytes) -> None:
    directory.mkdir()
    (directory / "bad.safetensors").write_bytes(content)
    kept(Store(directory, slots=3, min_tokens=1), [5] * 10)
    store = Store(directory, slots=3, min_tokens=1)
    assert store.summary()["entries"] == 1
    assert (directory / "torn" / "bad.safetensors").read_bytes() == content


def test_a_disk_that_does_not_take_it_costs_nothing_that_was_kept(directory: Path) -> None:
    store = Store(directory, slots=1, min_tokens=1)
    kept(store, [1] * 50)

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.add([2] * 50, True, full)
    assert usable(store, [1] * 51) == 50
    assert len(list(directory.iterdir())) == 1


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_common_prefix_is_what_counting_gives(a: list[int], b: list[int]) -> None:
    counted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(pack(a), pack(b)) == counted
