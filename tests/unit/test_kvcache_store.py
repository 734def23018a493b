import fcntl
import itertools
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_launcher.kvcache import store as store_module
from mlx_launcher.kvcache.files import Tensor
from mlx_launcher.kvcache.store import Limits, Match, Store, default_max_bytes, open_store
from mlx_launcher.kvcache.tree import common_prefix, pack

BYTES_PER_TOKEN = 8
ROOMY = Limits(slots=10, min_tokens=1, max_bytes=1 << 40)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kvcache" / "model"


def tensor(count: int) -> Tensor:
    return Tensor("x", "U8", (count * BYTES_PER_TOKEN,), memoryview(bytes(count * BYTES_PER_TOKEN)))


def kept(store: Store, tokens: Sequence[int]) -> bool:
    """As a host keeps them: only what no line holds yet."""
    after = store.held(tokens)
    new = tokens[after.usable if after else 0 :]
    return not new or store.add(after, new, [tensor(len(new))])


def kept_whole(store: Store, tokens: Sequence[int]) -> bool:
    return store.add_whole(tokens, [tensor(1)], {"classes": "[]"})


def usable(store: Store, tokens: Sequence[int]) -> int:
    found = store.find(tokens)
    return found.usable if found else 0


def numbers(*ranges: tuple[int, int]) -> list[int]:
    return [number for start, end in ranges for number in range(start, end)]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def reopened(store: Store, limits: Limits = ROOMY) -> Store:
    store.close()
    return Store(store.directory, limits)


def test_the_longest_match_wins_and_one_token_is_always_left_to_run(directory: Path) -> None:
    store = Store(directory, ROOMY)
    kept(store, numbers((0, 1000), (5000, 6000)))
    kept(store, numbers((0, 2000)))
    for opened in (store, reopened(store)):
        assert usable(opened, numbers((0, 3000))) == 2000
        assert usable(opened, numbers((0, 1000), (5000, 5500), (9000, 9100))) == 1500
        assert usable(opened, numbers((0, 2000))) == 1999
        assert usable(opened, numbers((7, 100))) == 0


def test_a_turn_writes_its_new_tokens_and_nothing_else(directory: Path) -> None:
    store = Store(directory, ROOMY)
    sizes = []
    for turn in range(1, 21):
        before = store.summary()["bytes"]
        kept(store, numbers((0, 500 * turn)))
        sizes.append(store.summary()["bytes"] - before)
    # Beside the data: 4 bytes a token, as text, and a header.
    assert max(sizes) < 500 * (BYTES_PER_TOKEN + 4 * 4 / 3) + 250
    assert store.summary()["entries"] == 1
    assert usable(reopened(store), numbers((0, 10_001))) == 10_000


def test_what_two_conversations_share_is_on_the_disk_once(directory: Path) -> None:
    store = Store(directory, ROOMY)
    kept(store, numbers((0, 1000)))
    kept(store, numbers((0, 1000), (5000, 5100)))
    kept(store, numbers((0, 1000), (6000, 6100)))
    assert store.summary()["entries"] == 2
    assert store.summary()["bytes"] < 1.5 * 1200 * BYTES_PER_TOKEN + 1200 * 6
    assert usable(store, numbers((0, 1000), (6000, 6200))) == 1100


def test_what_cannot_be_trimmed_serves_only_as_a_whole(directory: Path) -> None:
    store = Store(directory, ROOMY)
    kept_whole(store, numbers((0, 500)))
    for opened in (store, reopened(store)):
        assert usable(opened, numbers((0, 400))) == 0
        assert usable(opened, numbers((0, 500))) == 0
        assert usable(opened, numbers((0, 501))) == 500
        assert opened.has_whole(numbers((0, 500)))
        store = opened
    # The shorter one is worth keeping beside the longer one: it cannot be had from it.
    kept_whole(store, numbers((0, 800)))
    assert usable(store, numbers((0, 600))) == 500


def test_a_match_of_a_handful_of_tokens_is_not_worth_reading(directory: Path) -> None:
    store = Store(directory, ROOMY._replace(min_tokens=100))
    kept(store, numbers((0, 500)))
    assert usable(store, numbers((0, 99), (9000, 9500))) == 0
    assert usable(store, numbers((0, 100), (9000, 9500))) == 100


def test_the_least_recently_used_conversation_goes_first_also_after_a_restart(directory: Path) -> None:
    store = Store(directory, ROOMY)
    for number, used in ((1, 30), (2, 10), (3, 20)):
        for length in (50, 100):
            kept(store, [number] * length)
        match = store.find([number] * 101)
        assert match
        os.utime(match.segment.path, (used, used))
    store = reopened(store, ROOMY._replace(slots=3))
    kept(store, [4] * 50)
    assert [usable(store, [number] * 101) for number in (1, 2, 3, 4)] == [100, 0, 100, 50]
    assert len(files(directory)) == 5


def test_the_bytes_stay_bounded_and_the_line_that_grows_is_not_cut(directory: Path) -> None:
    one = 600 * BYTES_PER_TOKEN + 6000
    store = Store(directory, ROOMY._replace(max_bytes=3 * one))
    for number in range(10):
        assert kept(store, [number] * 600)
        assert store.summary()["bytes"] <= 3 * one
    assert usable(store, [9] * 601) == 600
    assert usable(store, [1] * 601) == 0
    tokens = [77] * 300
    while kept(store, tokens):
        tokens = [*tokens, *range(300)]
    # Full of itself: what is kept of it stays, and the rest is not written.
    assert store.summary()["bytes"] <= 3 * one
    assert usable(store, tokens) == len(tokens) - 300


def test_the_bound_counts_all_models_and_unused_ones_give_way(tmp_path: Path) -> None:
    one = 600 * BYTES_PER_TOKEN + 6000
    limits = ROOMY._replace(max_bytes=3 * one)
    old = open_store(tmp_path, "a" * 16, limits)
    for number in range(2):
        kept(old, [number] * 600)
    new = open_store(tmp_path, "b" * 16, limits)
    for number in range(2):
        kept(new, [number] * 600)
    # In use: nothing of it is touched, the other one makes room by itself.
    assert len(files(old.directory)) == 2
    old.close()
    for number in range(2, 5):
        assert kept(new, [number] * 600)
    assert files(old.directory) == []
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * one


def test_an_entry_that_another_server_removes_meanwhile_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_store(tmp_path, "a" * 16, ROOMY)
    kept(other, [1] * 50)
    gone = files(other.directory)[0]
    stat = Path.stat

    def vanished(path: Path, **given: bool) -> os.stat_result:
        if path == gone:
            raise FileNotFoundError(path)
        return stat(path, **given)

    store = open_store(tmp_path, "b" * 16, ROOMY._replace(max_bytes=1000))
    monkeypatch.setattr(Path, "stat", vanished)
    assert not kept(store, [2] * 500)
    assert kept(store, [2] * 10)


def test_a_second_server_of_the_model_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    first = open_store(tmp_path, "a" * 16, ROOMY)
    second = open_store(tmp_path, "a" * 16, ROOMY)
    assert first.directory != second.directory
    kept(first, [1] * 50)
    kept(second, [2] * 50)
    assert (usable(first, [2] * 51), usable(second, [2] * 51)) == (0, 50)
    directory = first.directory
    first.close()
    assert open_store(tmp_path, "a" * 16, ROOMY).directory == directory


def test_a_folder_that_others_may_read_is_closed_to_them(directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    Store(directory, ROOMY)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_removed_meanwhile_is_made_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lock's opening and its locking."""
    lock, removed = fcntl.flock, list[Path]()

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(directory)
            shutil.rmtree(directory)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    store = Store(directory, ROOMY)
    monkeypatch.undo()
    assert kept(store, [1] * 50)
    with pytest.raises(BlockingIOError):
        Store(directory, ROOMY)


def test_a_link_in_place_of_the_folder_for_torn_files_is_not_followed(directory: Path, tmp_path: Path) -> None:
    store = Store(directory, ROOMY)
    kept(store, [1] * 50)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (directory / "torn").symlink_to(elsewhere)
    files(directory)[0].write_bytes(b"torn")
    store = reopened(store)
    assert (store.summary()["torn"], usable(store, [1] * 51), list(elsewhere.iterdir())) == (1, 0, [])


Usage = namedtuple("Usage", "total used free")


def test_other_programs_keep_some_of_the_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(directory, ROOMY)
    assert kept(store, [1] * 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, store_module.MIN_FREE_BYTES - 5000))
    assert not kept(store, [2] * 50)
    assert store.summary()["bytes"] == 0


@pytest.mark.parametrize(("free", "bound"), [(10**12, 40 * 10**9), (10**10, 25 * 10**8)])
def test_without_a_bound_it_is_40_gb_or_a_quarter_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, bound: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 0, free))
    assert default_max_bytes(tmp_path / "not" / "there") == bound


def line_of_three(directory: Path) -> tuple[Store, list[Path]]:
    store = Store(directory, ROOMY)
    for length in (100, 200, 300):
        kept(store, numbers((0, length)))
    return store, [segment.path for segment in store.lines()[0].line()]


@pytest.mark.parametrize("content", [b"", bytes(100), "half", "renamed", "other tokens"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_torn_is_set_aside_at_start_with_what_goes_on_from_it(
    directory: Path, content: bytes | str, which: int
) -> None:
    store, line = line_of_three(directory)
    kept(store, [5] * 10)
    whole = line[which].read_bytes()
    at = whole.index(b'"tokens": "') + len(b'"tokens": "')
    torn = {
        "half": whole[: len(whole) // 2],
        "renamed": whole.replace(b'"tokens"', b'"nekots"'),
        "other tokens": whole[:at] + b"////" + whole[at + 4 :],
    }
    line[which].write_bytes(torn[content] if isinstance(content, str) else content)
    store = reopened(store)
    assert usable(store, numbers((0, 300))) == (0, 100, 200)[which]
    assert usable(store, [5] * 11) == 10
    assert store.summary()["torn"] == 3 - which
    assert len(list((directory / "torn").iterdir())) == 3 - which
    assert reopened(store).summary()["torn"] == 0


def test_a_missing_link_costs_what_goes_on_from_it_only(directory: Path) -> None:
    store, line = line_of_three(directory)
    line[1].unlink()
    store = reopened(store)
    assert usable(store, numbers((0, 300))) == 100
    kept(store, numbers((0, 300)))
    assert usable(store, numbers((0, 300))) == 299


def test_a_segment_that_proves_unreadable_goes_with_its_children(directory: Path) -> None:
    store, line = line_of_three(directory)
    match = store.find(numbers((0, 201)))
    assert match
    store.set_aside(match.segment.line()[1])
    assert usable(store, numbers((0, 300))) == 100
    assert [path.exists() for path in line] == [True, False, False]


def test_a_disk_that_does_not_take_it_costs_nothing_that_was_kept(directory: Path) -> None:
    store = Store(directory, ROOMY)
    kept(store, [1] * 50)

    def full() -> Iterator[Tensor]:
        yield tensor(1)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.add(None, [2] * 50, full())
    assert usable(store, [1] * 51) == 50
    assert usable(store, [2] * 51) == 0
    assert len(files(directory)) == 1


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.integers(0, 3))
def test_the_common_prefix_is_what_counting_gives(a: list[int], b: list[int], skip: int) -> None:
    counted = next((i for i, (x, y) in enumerate(zip(a, b[skip:], strict=False)) if x != y), None)
    expected = min(len(a), len(b[skip:])) if counted is None else counted
    assert common_prefix(pack(a), pack(b), skip) == expected


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_any_conversations_match_as_a_plain_list_of_them_would(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]], wanted: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("kv") / "m"
    store = Store(directory, ROOMY._replace(slots=100))
    for prompt in prompts:
        kept(store, prompt)
    best = max(common_prefix(pack(prompt), pack(wanted)) for prompt in prompts)
    for opened in (store, reopened(store, ROOMY._replace(slots=100))):
        match: Match | None = opened.held(wanted)
        assert (match.usable if match else 0) == best
        line = match.segment.line() if match else []
        assert all(child.start <= parent.end for parent, child in itertools.pairwise(line))


def test_conversations_that_part_where_an_entry_ends_are_counted_too(directory: Path) -> None:
    store = Store(directory, ROOMY._replace(slots=3))
    kept(store, numbers((0, 100)))
    for number in range(1000, 1006):
        kept(store, [*range(100), *([number] * 50)])
        assert store.summary()["entries"] <= 3
    assert [usable(store, [*range(100), *([number] * 51)]) for number in (1000, 1005)] == [100, 150]


def test_a_conversation_whose_turns_each_leave_something_off_counts_once(directory: Path) -> None:
    store = Store(directory, ROOMY._replace(slots=3))
    for number in (1000, 2000):
        kept(store, [number] * 50)
    said: list[int] = []
    for turn in range(10):
        # A thought that the template shows in the last turn only.
        kept(store, [*said, *([turn] * 20), *([5000] * 30)])
        said += [turn] * 20
    assert store.summary()["entries"] == 3
    assert [usable(store, [number] * 51) for number in (1000, 2000)] == [50, 50]
    assert usable(store, [*said, 7]) == 200


def test_a_handful_of_shared_tokens_makes_no_line_depend_on_another(directory: Path) -> None:
    store = Store(directory, Limits(slots=2, min_tokens=100, max_bytes=1 << 40))
    for number in range(4):
        kept(store, [*range(50), *([number] * 200)])
    assert all(segment.parent is None for segment in store.lines())
    assert [usable(store, [*range(50), *([number] * 201)]) for number in range(4)] == [0, 0, 250, 250]
