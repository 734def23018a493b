"""The KV cache on disk, with a model whose answers depend on the whole prompt."""

from pathlib import Path

import pytest
from support.hosts import Host
from support.launched import chat
from support.prompts import prose
from support.waiting import free_port, until

from mlx_launcher.models.safetensors import read_header


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kvcache"


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.safetensors"))


def test_a_prefix_seen_before_is_read_from_the_disk_and_counted_exactly(random_model: Path, directory: Path) -> None:
    prompt = prose(1, 2000)
    with Host(random_model, free_port(), directory) as host:
        first, first_s = host.timed_chat(prompt, max_tokens=8)
        again, again_s = host.timed_chat(prompt, max_tokens=8)
        tokens = first.json["usage"]["prompt_tokens"]
        assert tokens > 2000
        assert first.cached == 0
        # One token has to be run for the model to go on from.
        assert again.cached == tokens - 1
        assert again.text == first.text
        until(lambda: entries(directory))
        # A ratio in one run (about 90 measured), not a time.
        assert first_s / again_s > 10
    with Host(random_model, free_port(), directory) as successor:
        after_restart = chat(successor.port, prompt, max_tokens=8)
        assert (after_restart.cached, after_restart.text) == (tokens - 1, first.text)


def conversation(port: int, seed: int) -> list[str]:
    """The answers of two turns; the second goes on from what the first left in the cache."""
    messages = [{"role": "user", "content": prose(seed, 150)}]
    texts = []
    for _ in range(2):
        reply = chat(port, messages, max_tokens=8)
        texts.append(reply.text)
        messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": prose(seed + 100, 60)}]
    return texts


def damage(directory: Path) -> int:
    """Zeroes the keys and values of every entry, and leaves the files whole."""
    for entry in entries(directory):
        header = read_header(entry)
        content = bytearray(entry.read_bytes())
        start = len(content) - max(tensor["data_offsets"][1] for tensor in header.values())
        for tensor in header.values():
            if len(tensor["shape"]) == 4:
                begin, end = tensor["data_offsets"]
                content[start + begin : start + end] = bytes(end - begin)
        entry.write_bytes(content)
    return len(entries(directory))


def test_greedy_answers_are_the_same_with_the_cache_and_without_and_a_damaged_one_would_show(
    random_model: Path, directory: Path
) -> None:
    seeds = range(20)
    with Host(random_model, free_port(), directory, cache={"enabled": False}) as host:
        without = [conversation(host.port, seed) for seed in seeds]
    assert entries(directory) == []
    for memory in (None, 0):
        # Twice, so that the second round comes from the cache altogether: from memory, and from the disk.
        with Host(random_model, free_port(), directory, cache={"slots": 50, "memory_bytes": memory}) as host:
            first_round = [conversation(host.port, seed) for seed in seeds]
            second_round = [conversation(host.port, seed) for seed in seeds]
            assert host.counters["cached_tokens"] > host.counters["prompt_tokens"] / 2
        assert first_round == without
        assert second_round == without
    assert damage(directory) >= 20
    with Host(random_model, free_port(), directory, cache={"slots": 50}) as host:
        damaged = [conversation(host.port, seed) for seed in seeds]
    assert sum(a != b for a, b in zip(damaged, without, strict=True)) > 10


def test_answers_of_n_are_like_single_ones(random_model: Path, directory: Path) -> None:
    with Host(random_model, free_port(), directory) as host:
        single = chat(host.port, prose(5, 200), max_tokens=6).text
        double = chat(host.port, prose(5, 200), max_tokens=6, n=2)
        assert [choice["message"]["content"] for choice in double.json["choices"]] == [single, single]


def test_nothing_is_left_where_mlx_textgen_alone_would_write(
    random_model: Path, directory: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with Host(random_model, free_port(), directory, HOME=str(home)) as host:
        assert chat(host.port, prose(2, 200), max_tokens=4).status == 200
        until(lambda: entries(directory))
    assert list(home.rglob("*textgen*")) == []
