"""The KV cache on disk, with a model whose answers depend on the whole prompt."""

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.hosts import Host
from support.launched import chat, http_request, stream_events
from support.prompts import prose
from support.waiting import free_port, until

from mlx_launcher.kvcache.files import Entry, Tensor, read_about
from mlx_launcher.models.safetensors import read_header


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kvcache"


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*/*.safetensors") if not path.name.startswith("."))


def test_a_prefix_seen_before_is_read_from_the_disk_and_counted_exactly(random_model: Path, directory: Path) -> None:
    prompt = prose(1, 2000)
    with Host(random_model, free_port(), directory) as host:
        first, again = (chat(host.port, prompt, max_tokens=8) for _ in range(2))
        tokens = first.json["usage"]["prompt_tokens"]
        assert tokens > 2000
        assert first.cached == 0
        # One token has to be run for the model to go on from.
        assert again.cached == tokens - 1
        assert again.text == first.text
        until(lambda: host.counters["requests"] == 2 and not host.counters["in_flight"])
        assert host.counters["processed_tokens"] == tokens + 1
        until(lambda: entries(directory))
    with Host(random_model, free_port(), directory) as successor:
        after_restart = chat(successor.port, prompt, max_tokens=8)
        assert (after_restart.cached, after_restart.text) == (tokens - 1, first.text)


def kept(host: Host) -> int:
    """Conversations on disk, as the host reports them."""
    return int((host.counters.get("kv_cache") or {"entries": 0})["entries"])


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
    """Zeroes the keys and values of every entry, and leaves the files whole, with checksums that are right."""
    for entry in entries(directory):
        tensors = []
        for name, tensor in read_header(entry).items():
            begin, end = tensor["data_offsets"]
            tensors.append(Tensor(name, tensor["dtype"], tuple(tensor["shape"]), memoryview(bytes(end - begin))))
        Entry(read_about(entry), tensors).write(entry)
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


def test_two_servers_of_one_model_are_both_right_and_both_keep(random_model: Path, directory: Path) -> None:
    prompts = [prose(seed, 300) for seed in range(4)]
    with Host(random_model, free_port(), directory, cache={"enabled": False}) as host:
        expected = [chat(host.port, prompt, max_tokens=6).text for prompt in prompts]
    for round_ in range(2):
        with (
            Host(random_model, free_port(), directory) as one,
            Host(random_model, free_port(), directory) as other,
            ThreadPoolExecutor() as pool,
        ):
            asked = [(host.port, prompt) for prompt in prompts for host in (one, other)]
            replies = list(pool.map(lambda it: chat(*it, max_tokens=6), asked))
            assert [reply.text for reply in replies] == [text for text in expected for _ in range(2)]
            if round_:
                assert all(reply.cached > 250 for reply in replies)
    assert len(list(directory.iterdir())) == 2


def test_two_conversations_that_begin_alike_do_not_cost_each_other(random_model: Path, directory: Path) -> None:
    """As an agent and its helper: the second is asked at once, before the first is on the disk."""
    system = {"role": "system", "content": prose(1, 400)}
    first = [system, {"role": "user", "content": prose(2, 400)}]
    second = [system, {"role": "user", "content": prose(3, 400)}]
    with Host(random_model, free_port(), directory) as host:
        one = chat(host.port, first, max_tokens=4)
        other = chat(host.port, second, max_tokens=4)
        again = chat(host.port, first, max_tokens=4)
    assert (one.cached, other.cached > 400) == (0, True)
    assert (again.text, again.cached) == (one.text, one.json["usage"]["prompt_tokens"] - 1)


def test_more_conversations_in_memory_than_places_on_disk_end_in_good_order(
    random_model: Path, directory: Path
) -> None:
    with Host(random_model, free_port(), directory, cache={"slots": 2}) as host:
        for seed in range(5):
            assert chat(host.port, prose(seed, 200), max_tokens=40).status == 200
    with Host(random_model, free_port(), directory, cache={"slots": 2, "memory_bytes": 0}) as host:
        assert [chat(host.port, prose(seed, 200), max_tokens=2).cached > 200 for seed in (3, 4)] == [True, True]


def test_the_answer_is_out_before_a_byte_is_written(random_model: Path, directory: Path) -> None:
    def more_than(count: int) -> bool:
        return len(entries(directory)) > count

    with Host(random_model, free_port(), directory) as host:
        for seed in range(5):
            before = len(entries(directory))
            question = [{"role": "user", "content": prose(seed, 600)}]
            body = {"messages": question, "max_tokens": 4, "stream": True}
            reply = http_request(host.port, "/v1/chat/completions", body)
            answered = time.time()
            assert list(stream_events(reply.body))[-1] == "[DONE]"
            until(functools.partial(more_than, before))
            assert max(path.stat().st_mtime for path in entries(directory)) >= answered


def test_a_conversation_of_many_turns_costs_its_new_tokens(random_model: Path, directory: Path) -> None:
    messages = [{"role": "user", "content": prose(1, 300)}]
    written, descriptors = [], []
    with Host(random_model, free_port(), directory) as host:
        process = psutil.Process(host.process.pid)
        for turn in range(200):
            reply = chat(host.port, messages, max_tokens=4)
            tokens = reply.json["usage"]["prompt_tokens"]
            assert reply.cached >= tokens - 40 or turn == 0
            written.append(sum(path.stat().st_size for path in entries(directory)))
            descriptors.append(process.num_fds())
            messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": prose(turn, 10)}]
        until(lambda: kept(host) == 1)
        assert process.num_fds() <= max(descriptors[:20])
        assert host.counters["kv_cache"]["problem"] is None
    per_token = sum(path.stat().st_size for path in entries(directory)) / tokens
    # The rest names the tokens.
    assert per_token < 1.5 * state_bytes_per_token(random_model)
    with Host(random_model, free_port(), directory) as host:
        assert chat(host.port, messages, max_tokens=4).cached >= tokens


def state_bytes_per_token(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = 2 if config.get("torch_dtype") in ("float16", "bfloat16") else 4
    return int(2 * heads * layers * size * width)


def captured(tmp_path: Path, system: str) -> Path:
    """A client's request as somebody would have captured it."""
    file = tmp_path / "captured.json"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Yesterday's question"}]
    file.write_text(json.dumps({"model": "m", "messages": messages, "stream": True}))
    return file


def test_the_first_request_of_the_day_is_a_follow_up(random_model: Path, directory: Path, tmp_path: Path) -> None:
    system = prose(8, 500)
    question = [{"role": "system", "content": system}, {"role": "user", "content": "Today's question"}]
    with Host(random_model, free_port(), directory, cache={"enabled": False}) as host:
        expected = chat(host.port, question, max_tokens=6).text
    files = [str(tmp_path / "missing.json"), str(captured(tmp_path, system))]
    with Host(random_model, free_port(), directory, settings={"warmup": files}) as host:
        until(lambda: kept(host) == 1)
        until(lambda: not any("are done" in note for note in host.counters["notes"]))
        assert host.counters["notes"] == [f"warmup: {files[0]}: No such file or directory"]
        assert host.counters["requests"] == 0
        reply = chat(host.port, question, max_tokens=6)
        assert (reply.text, reply.cached > 500) == (expected, True)
    with Host(random_model, free_port(), directory, settings={"warmup": files[1:]}) as host:
        until(lambda: host.counters.get("notes") == [])
        assert host.counters["processed_tokens"] == 0


def test_warming_up_gives_way_to_who_asks(random_model: Path, directory: Path, tmp_path: Path) -> None:
    files = [str(captured(tmp_path, prose(8, 6000)))]
    with Host(random_model, free_port(), directory, settings={"warmup": files, "prefill_batch": 64}) as host:
        until(lambda: host.counters.get("notes") == ["warmup: 0 of 1 prompts are done"])
        assert chat(host.port, "Hello", max_tokens=2).status == 200
        assert host.counters["notes"] == ["warmup: 0 of 1 prompts are done"]
