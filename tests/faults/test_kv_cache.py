"""Whatever happens to the KV cache on disk, answers stay right; only speed is lost."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hosts import Host
from support.launched import Reply, chat
from support.prompts import prose
from support.unprivileged import drop_capabilities
from support.waiting import free_port, until

from mlx_launcher.demo import build_random

FROM_DISK = {"memory_bytes": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kvcache"


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*/*.safetensors") if not path.name.startswith("."))


def problem(host: Host) -> str | None:
    return (host.counters.get("kv_cache") or {}).get("problem")


def killed_while_writing(model: Path, directory: Path, prompt: str) -> bool:
    """Asks, and kills the server as soon as a half-written file is seen; whether one was left."""
    host = Host(model, free_port(), directory)
    try:
        until(lambda: host.ready)
        before = len(entries(directory))
        assert chat(host.port, prompt, max_tokens=2).status == 200
        # No pause between two looks: a write takes milliseconds.
        deadline = time.monotonic() + 30
        while not list(directory.glob("*/.partial-*")) and len(entries(directory)) == before:
            assert time.monotonic() < deadline
    finally:
        host.kill()
    return bool(list(directory.glob("*/.partial-*")))


def test_07_killed_while_an_entry_is_written(model: Path, directory: Path) -> None:
    prompts = [prose(seed, 1000) for seed in range(8)]
    with Host(model, free_port(), directory) as host:
        expected = chat(host.port, prompts[0], max_tokens=8).text
    # Whether the kill meets the write is chance: as often as it takes.
    assert any(killed_while_writing(model, directory, prompt) for prompt in prompts[1:])
    with Host(model, free_port(), directory) as host:
        reply = chat(host.port, prompts[0], max_tokens=8)
        assert (reply.status, reply.text, reply.cached > 900) == (200, expected, True)
        assert list(directory.glob("*/.partial-*")) == []


def test_46_a_full_disk_costs_what_would_be_kept_and_is_said(model: Path, directory: Path) -> None:
    with Host(model, free_port(), directory, cache=FROM_DISK, max_file_bytes=100_000) as host:
        first = chat(host.port, prose(4, 300), max_tokens=6)
        until(lambda: "File too large" in str(problem(host)), what="the reason in the beats")
        again = chat(host.port, prose(4, 300), max_tokens=6)
        assert (again.status, again.text, again.cached) == (200, first.text, 0)
        assert "the KV cache is not saved" in host.log()
    assert [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size >= 100_000] == []


def test_46_what_is_in_memory_serves_on_without_a_disk(model: Path, directory: Path) -> None:
    with Host(model, free_port(), directory, max_file_bytes=100_000) as host:
        first, again = (chat(host.port, prose(4, 300), max_tokens=6) for _ in range(2))
        assert (again.text, again.cached) == (first.text, again.json["usage"]["prompt_tokens"] - 1)


def read_only(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o500)


def a_file(directory: Path) -> None:
    directory.write_text("not a directory")


def read_only_folder(directory: Path) -> None:
    for folder in directory.iterdir():
        folder.chmod(0o500)


@pytest.mark.parametrize("spoil", [read_only, a_file])
def test_48_a_cache_directory_that_cannot_be_used_is_said_and_served_without(
    model: Path, directory: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(directory)
    with Host(model, free_port(), directory, preexec=drop_capabilities) as host:
        first, again = (chat(host.port, prose(4, 300), max_tokens=6) for _ in range(2))
        assert (first.status, again.status, again.text) == (200, 200, first.text)
        until(lambda: str(directory) in str(problem(host)), what="the reason in the beats")


def test_48_one_that_becomes_read_only_while_serving(model: Path, directory: Path) -> None:
    with Host(model, free_port(), directory, cache=FROM_DISK, preexec=drop_capabilities) as host:
        first = chat(host.port, prose(4, 300), max_tokens=6)
        until(lambda: entries(directory))
        read_only_folder(directory)
        assert chat(host.port, prose(5, 300), max_tokens=6).status == 200
        until(lambda: "not saved" in str(problem(host)), what="the reason in the beats")
        again = chat(host.port, prose(4, 300), max_tokens=6)
        assert (again.text, again.cached > 0) == (first.text, True)


def spoil_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"tokens"', b'"nekots"'))


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(500))


def turn_signs(path: Path) -> None:
    """As long as before, and with the header that it had."""
    raw = bytearray(path.read_bytes())
    for position in range(8 + int.from_bytes(raw[:8], "little") + 3, len(raw), 4):
        raw[position] ^= 0x80
    path.write_bytes(raw)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [spoil_header, tear, garbage, turn_signs, remove])
@pytest.mark.parametrize("while_serving", [False, True])
def test_49_what_is_torn_or_missing_is_set_aside_and_made_again(
    model: Path, directory: Path, spoil: Callable[[Path], None], while_serving: bool
) -> None:
    prompt = prose(9, 300)
    with Host(model, free_port(), directory, cache=FROM_DISK) as host:
        expected = chat(host.port, prompt, max_tokens=6)
        until(lambda: entries(directory))
        if while_serving:
            spoil(entries(directory)[0])
            assert chat(host.port, prompt, max_tokens=6).text == expected.text
    if not while_serving:
        spoil(entries(directory)[0])
    with Host(model, free_port(), directory, cache=FROM_DISK) as host:
        replies: list[Reply] = [chat(host.port, prompt, max_tokens=6) for _ in range(2)]
        assert [reply.text for reply in replies] == [expected.text] * 2
        assert replies[1].cached > 300
    assert list(directory.rglob(".partial*")) == []


def test_49_the_index_of_mlx_textgen_is_neither_read_nor_written(model: Path, directory: Path) -> None:
    (directory / "m").mkdir(parents=True)
    index = directory / "m" / "cached_prompts.json"
    index.write_text("{ torn")
    with Host(model, free_port(), directory) as host:
        assert chat(host.port, prose(2, 200), max_tokens=4).status == 200
    assert index.read_text() == "{ torn"


def test_50_another_model_under_the_same_name_does_not_see_its_entries(
    model: Path, directory: Path, tmp_path: Path
) -> None:
    place = tmp_path / "same" / "name"
    answers = []
    for seed in (0, 7):
        shutil.rmtree(place, ignore_errors=True)
        build_random(place, seed=seed)
        with Host(place, free_port(), directory) as host:
            reply = chat(host.port, prose(3, 300), max_tokens=8)
            assert reply.cached == 0
            answers.append(reply.text)
    assert answers[0] != answers[1]
    with Host(place, free_port(), directory) as host:
        again = chat(host.port, prose(3, 300), max_tokens=8)
        assert (again.text, again.cached > 0) == (answers[1], True)
