"""`mlx-launch bench` without a server: prompts of a length, what is asked in which order, figures and the table."""

import http.server
import importlib.util
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.supervised import make_plan

from mlx_launcher.bench import plot
from mlx_launcher.bench.client import Address, Answer, Message, ask
from mlx_launcher.bench.figures import Outcome, Spread, Stored, as_json
from mlx_launcher.bench.measure import Measured, measure
from mlx_launcher.bench.prompt import WORDS, words, words_for
from mlx_launcher.cli.bench import _one_interrupt
from mlx_launcher.cli.bench_table import digits, lines
from mlx_launcher.cli.throwaway import Throwaway, isolated
from mlx_launcher.errors import LaunchError

FAILURE = LaunchError("failed", "its server failed: the weights are torn", "Download them again")


def answer(total_s: float = 1.0, **changes: Any) -> Answer:
    base = Answer("text", total_s / 2, total_s, total_s, 100, 80, 8, 8)
    return base._replace(**changes)


def test_each_prompt_is_new_from_its_first_word_on() -> None:
    made = [words(number, 300) for number in range(1, 30)]
    assert len({text.split()[0] for text in made}) == len(made)
    assert made[0] == words(1, 300)
    assert {len(text.split()) for text in made} == {300}


@pytest.mark.parametrize("overhead", [0, 7, 2000])
@pytest.mark.parametrize("each", [len, lambda word: 1 + len(word) // 3])
@pytest.mark.parametrize("tokens", [3000, 8000, 32_000])
def test_a_prompt_has_as_many_tokens_as_asked_for(tokens: int, each: Callable[[str], int], overhead: int) -> None:
    def count(text: str) -> int:
        return overhead + sum(each(f" {word}") for word in text.split())

    assert count(words(3, words_for(tokens, count))) == pytest.approx(tokens, rel=0.02)


def test_a_prompt_has_a_word_even_where_the_template_alone_is_longer() -> None:
    assert words_for(10, lambda text: 50 + len(text)) == 1


@pytest.mark.parametrize("count", [lambda _: None, lambda _: 12])
def test_a_server_that_does_not_count_is_told_so(count: Callable[[str], int | None]) -> None:
    with pytest.raises(LaunchError, match="how many tokens"):
        words_for(100, count)


class Recorder:
    """A server that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[Message]]] = []
        self.restarted_after: int | None = None

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        self.asked.append((max_tokens, list(messages)))
        tokens = sum(len(message["content"]) for message in messages)
        return answer(text=f"answer {len(self.asked)}", prompt_tokens=tokens)

    def restart(self) -> None:
        self.restarted_after = len(self.asked)


def test_each_conversation_grows_and_goes_on_after_one_restart() -> None:
    server, said = Recorder(), list[str]()
    measured = measure(server, 2000, 3, 0, said.append)
    probes, requests = server.asked[:2], server.asked[2:]
    assert [max_tokens for max_tokens, _ in probes] == [1, 1]
    assert [max_tokens for max_tokens, _ in requests] == [8, 8, 64] * 3 + [8] * 3
    assert server.restarted_after == 2 + 9
    for number in range(3):
        talk = [requests[number * 3 + turn][1] for turn in range(3)] + [requests[9 + number][1]]
        assert [len(messages) for messages in talk] == [1, 3, 5, 7]
        for shorter, longer in itertools.pairwise(talk):
            assert longer[: len(shorter)] == shorter
        assert [message["role"] for message in talk[-1]] == ["user", "assistant"] * 3 + ["user"]
    first = [asked.prompt_tokens for asked in measured.first]
    assert first == pytest.approx([2000] * 3, rel=0.02)
    assert list(map(len, (measured.first, measured.follow_up, measured.long, measured.after_restart))) == [3] * 4
    assert said[0] == "prompt"
    assert "restart" in said


def test_prompts_are_new_in_every_run_and_the_same_for_all_backends_of_one() -> None:
    """A server of the user's may keep a cache that knows those of the last run."""

    def first_words(run: int) -> list[str]:
        server = Recorder()
        measure(server, 300, 3, run, lambda _: None)
        return [messages[0]["content"].split()[0] for _, messages in server.asked[2:]]

    assert first_words(7) == first_words(7)
    assert not set(first_words(7)) & set(first_words(8))
    assert len({word[0] for word in first_words(7)}) == 3


def test_a_measured_server_takes_nothing_that_the_users_own_has(tmp_path: Path) -> None:
    plan: Any = make_plan(tmp_path, 8081, metrics_port=9100, standby=True, idle_timeout_s=60.0)
    plan["backend"]["settings"]["cache"] = {}
    alone = isolated(plan, tmp_path / "kvcache")
    assert (alone["metrics_port"], alone["standby"], alone["idle_timeout_s"], alone["fallback"]) == (
        None,
        False,
        0,
        None,
    )
    assert plan["metrics_port"] == 9100


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plan: Any = make_plan(tmp_path / "file" / "8081", 8081)
    with pytest.raises(LaunchError, match=r"nothing can be written to .*8081: Not a directory") as refused:
        Throwaway(plan, lambda _: None)
    assert "room" in refused.value.hint


def test_a_signal_is_an_interrupt_unless_it_is_ignored_as_nohup_has_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _one_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_rates_count_what_was_computed() -> None:
    one = answer(3.0, first_s=1.0, last_s=3.0, prompt_tokens=100, cached_tokens=60, completion_tokens=9)
    assert (one.prefill_rate, one.decode_rate) == (40.0, 4.0)
    assert one._replace(cached_tokens=None).prefill_rate == 100.0
    assert one._replace(prompt_tokens=None).prefill_rate is None
    assert one._replace(pieces=7).decode_rate is None
    assert one._replace(last_s=one.first_s + 0.05).decode_rate is None
    assert one._replace(completion_tokens=None).decode_rate is None


def test_a_spread_is_the_middle_half_and_needs_every_value() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread.of([2.0]) == Spread(2, 2, 2)
    assert Spread.of([1, None]) is None
    assert Spread.of([]) is None
    assert Spread(10, 8, 11).part == 0.2
    assert Spread(0, 0, 0).part == 0


def measured(total_s: float = 1.0, **changes: Any) -> Measured:
    return Measured(*([answer(total_s / (kind + 1), **changes)] * 3 for kind in range(4)))


def test_the_table_fits_a_terminal_and_leaves_nobody_out() -> None:
    outcomes = [
        Outcome("mlx", measured(50.0), Stored(10, 6_400_000)),
        Outcome(
            "a-backend-with-a-very-long-name", measured(12_345.6, prompt_tokens=1_234_567, cached_tokens=1_200_000)
        ),
        Outcome("torn", error=FAILURE),
        Outcome("silent", measured(0.0123, prompt_tokens=None, cached_tokens=None, completion_tokens=None)),
    ]
    shown = list(lines(outcomes))
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    assert "50.0 s   ±0 %" in text
    assert "2.00×" in text
    assert "6.4 MB" in text
    assert "1,200,000 (97 %)" in text
    assert shown[-1] == "torn: its server failed: the weights are torn"
    silent = [line for line in shown if line.startswith("  cached tokens")][-1]
    assert silent.split()[-1] == "-"


def test_one_value_has_no_spread() -> None:
    once = Outcome("mlx", Measured(*([answer(3.0)] for _ in range(4))))
    shown = list(lines([once]))
    assert "±" not in "".join(shown)
    assert shown[2].split() == ["first", "request", "3.00", "s"]


def test_what_scripts_get() -> None:
    row = as_json(Outcome("mlx", measured(2.0), Stored(3, 4000)))
    assert row["first_request_s"] == {"median": 2.0, "low": 2.0, "high": 2.0, "values": [2.0, 2.0, 2.0]}
    assert (row["follow_up_s"]["median"], row["after_restart_s"]["median"]) == (1.0, 0.5)
    assert row["cached_tokens"]["after_restart"]["median"] == 80
    assert (row["ok"], row["error"], row["cache"]) == (True, None, {"files": 3, "bytes": 4000})
    failed = as_json(Outcome("torn", error=FAILURE))
    assert failed.keys() == row.keys()
    assert (failed["ok"], failed["error"]["code"], failed["first_request_s"]) == (False, "failed", None)
    json.dumps([row, failed])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03123, "0.0312"), (0.5, "0.500"), (1.25, "1.25"), (98.72, "98.7"), (1204.3, "1,204")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_all_words_are_different() -> None:
    assert len(set(WORDS)) == len(WORDS)


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers every request with what its server holds."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, raw, asked = self.server.canned  # type: ignore[attr-defined]
        asked.append((dict(self.headers), json.loads(body)))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def canned() -> Iterator[Callable[..., tuple[Address, list[Any]]]]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Canned)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def answers(raw: bytes, status: int = 200) -> tuple[Address, list[Any]]:
        asked: list[Any] = []
        server.canned = (status, raw, asked)  # type: ignore[attr-defined]
        return Address("127.0.0.1", server.server_port, "the-model", "secret"), asked

    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


DONE = b"data: [DONE]\n\n"


def stream(*events: Any) -> bytes:
    return b": waiting\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def text(content: str) -> Any:
    return {"choices": [{"index": 0, "delta": {"content": content}}]}


def test_a_stream_is_read_with_its_usage(canned: Callable[..., tuple[Address, list[Any]]]) -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 20}}
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    raw = stream(role, text("one"), text(" two"), {"choices": [], "usage": usage}) + DONE
    address, asked = canned(raw)
    got = ask(address, [{"role": "user", "content": "Hi"}], 2)
    assert (got.text, got.prompt_tokens, got.cached_tokens, got.completion_tokens) == ("one two", 30, 20, 2)
    assert 0 < got.first_s <= got.last_s <= got.total_s
    headers, body = asked[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("the-model", 2, 0, True)


def test_a_server_without_usage_has_none(canned: Callable[..., tuple[Address, list[Any]]]) -> None:
    address, _ = canned(stream(text("one")) + DONE)
    assert ask(address, [], 2)[4:] == (None, None, None, 1)


def test_an_event_without_anything_in_it_is_passed_over(canned: Callable[..., tuple[Address, list[Any]]]) -> None:
    address, _ = canned(stream({"choices": [{"delta": None}]}, {"choices": None, "usage": None}, text("one")) + DONE)
    assert ask(address, [], 2).text == "one"


@pytest.mark.parametrize(
    ("status", "raw", "said"),
    [
        (400, b'{"error": {"message": "a prompt of 9 tokens and a context of 8"}}', "a context of 8"),
        (500, b"<html>", "HTTP 500"),
        (200, stream({"error": {"message": "out of memory"}}), "out of memory"),
        (200, b"data: {\n\n", "not JSON"),
        (200, stream(text("one")), "broke off"),  # it died in the middle of an answer
    ],
)
def test_an_error_is_told_in_the_servers_words(
    status: int, raw: bytes, said: str, canned: Callable[..., tuple[Address, list[Any]]]
) -> None:
    address, _ = canned(raw, status)
    with pytest.raises(LaunchError, match=said):
        ask(address, [], 2)


def test_nobody_there_is_an_error(canned: Callable[..., tuple[Address, list[Any]]]) -> None:
    with pytest.raises(LaunchError, match="broke off"):
        ask(Address("127.0.0.1", 1, "m"), [], 1)


def a_spread(median: float) -> dict[str, Any]:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "values": [median]}


def a_backend(name: str, first: float, follow_up: float, after_restart: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "ok": True,
        "prompt_tokens": a_spread(2404),
        "first_request_s": a_spread(first),
        "follow_up_s": a_spread(follow_up),
        "after_restart_s": after_restart and a_spread(after_restart),
    }


def a_table(*backends: dict[str, Any]) -> dict[str, Any]:
    model = {"id": "/home/somebody/models/Qwen3-4B", "path": "/home/somebody/models/Qwen3-4B"}
    return {"model": model, "prompt_tokens": 2400, "turns": 5, "backends": list(backends)}


def test_the_picture_has_the_figures_of_the_table_and_no_path(tmp_path: Path) -> None:
    failed = {"name": "broken", "ok": False, "prompt_tokens": None}
    file = tmp_path / "bench.svg"
    plot.check(file)
    plot.draw(a_table(a_backend("mlx", 12.4, 0.34, 0.41), a_backend("mlx-legacy", 12.9, 0.5, None), failed), file)
    text = file.read_text()
    for shown in (
        "12.4 s",
        "0.34 s, 36× faster",
        "0.41 s, 30× faster",
        "12.9 s",
        "0.5 s, 26× faster",
        "mlx-legacy",
        "Qwen3-4B",
        "2,404 tokens",
        "first request",
    ):
        assert shown in text
    assert "somebody" not in text
    assert "broken" not in text


@pytest.mark.parametrize("times", [(0.0004, 0.0003, 0.0005), (3.0, 2.9, 3.1), (9000.0, 0.01, 0.02)])
def test_any_times_make_a_picture_of_twice_a_readmes_width(tmp_path: Path, times: tuple[float, float, float]) -> None:
    file = tmp_path / "bench.png"
    plot.draw(a_table(*(a_backend(f"backend-{number}", *times) for number in range(8))), file)
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1600


def test_what_cannot_become_a_picture_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match=r"\.png or \.svg") as refused:
        plot.check(tmp_path / "bench.gif")
    assert refused.value.exit_code == 2
    with pytest.raises(LaunchError, match="no directory"):
        plot.check(tmp_path / "missing" / "bench.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LaunchError, match="matplotlib") as refused:
        plot.check(tmp_path / "bench.png")
    assert "-m pip install" in refused.value.hint
    with pytest.raises(LaunchError, match="no backend"):
        plot.draw(a_table(), tmp_path / "bench.png")


def test_a_picture_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be written"):
        plot.draw(a_table(a_backend("mlx", 1.0, 1.0, 1.0)), tmp_path / "missing" / "bench.png")
