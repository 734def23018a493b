"""What is counted of answers, what is added up of it, and how it is written down."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from mlx_launcher import system
from mlx_launcher.buckets import BOUNDS, FIRST_TOKEN_S, OUTCOMES, median
from mlx_launcher.host import timings
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.errors import QueueFullError, RequestError
from mlx_launcher.host.timings import Stopwatch, Timings
from mlx_launcher.supervisor import metrics
from mlx_launcher.supervisor.process import Server
from mlx_launcher.supervisor.record import Record
from mlx_launcher.supervisor.scrapes import look
from mlx_launcher.supervisor.totals import Totals, counted


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timings, "time", clock)
    return clock


def answer(counters: Counters, clock: Clock, wait_s: float, token_s: float, tokens: int, cached: int = 0) -> None:
    """One request for an answer to 100 tokens."""
    counters.stopwatch = Stopwatch(counters.timings, clock.now)
    counters.prompted(100, cached)
    clock.now += wait_s
    for number in range(tokens):
        clock.now += token_s if number else 0.0
        counters.decoded()
    counters.stopwatch.over()


def test_a_first_token_is_cold_or_warm_and_every_further_one_has_a_time(clock: Clock) -> None:
    counters = Counters()
    answer(counters, clock, 3.0, 0.05, 11)
    answer(counters, clock, 0.2, 0.1, 6, cached=50)
    answer(counters, clock, 0.3, 0.1, 1, cached=49)
    told = counters.timings.told()
    assert sum(told["timings"]["first_token_cold_s"]["counts"]) == 2
    assert told["timings"]["first_token_cold_s"]["sum"] == pytest.approx(3.3)
    assert told["timings"]["first_token_warm_s"]["counts"][FIRST_TOKEN_S.index(0.25)] == 1
    assert sum(told["timings"]["token_s"]["counts"]) == 15
    assert told["timings"]["token_s"]["sum"] == pytest.approx(1.0)
    assert (counters.prompt_tokens, counters.cached_tokens, counters.completion_tokens) == (300, 99, 18)
    assert told["tokens_per_s"] == {"last_answer": 10.0, "last_minute": 15.0}


def test_a_second_answer_to_one_request_is_no_second_wait_and_what_lies_between_them_no_tokens_time(
    clock: Clock,
) -> None:
    counters = Counters()
    answer(counters, clock, 1.0, 0.1, 3)
    counters.prompted(100, 0)
    clock.now += 50
    counters.decoded()
    told = counters.timings.told()["timings"]
    assert sum(told["first_token_cold_s"]["counts"]) == 1
    assert told["token_s"]["sum"] == pytest.approx(0.2)


def test_the_speed_is_of_the_last_minute_and_only_while_decoding(clock: Clock) -> None:
    counters = Counters()
    answer(counters, clock, 5.0, 0.1, 11)
    assert counters.timings.told()["tokens_per_s"]["last_minute"] == 10.0
    clock.now += timings.RECENT_S + 1
    assert counters.timings.told()["tokens_per_s"] == {"last_answer": 10.0, "last_minute": None}
    answer(counters, clock, 5.0, 0.5, 3)
    assert counters.timings.told()["tokens_per_s"]["last_minute"] == 2.0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (QueueFullError(3), "queue_full"),
        (RequestError(400, "no"), "client_error"),
        (RequestError(401, "no"), "client_error"),
        (RequestError(499, "left"), "cancelled"),
        (RequestError(503, "stopping", code="stopping"), "cancelled"),
        (RequestError(500, "broken", code="engine_error"), "server_error"),
        (ValueError("a bug"), "server_error"),
        (BrokenPipeError(), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_how_an_answer_may_end(error: BaseException | None, outcome: str) -> None:
    counting = Timings()
    counting.ended(error)
    answers = counting.told()["answers"]
    assert {name for name, count in answers.items() if count} == {outcome}


def test_threads_lose_nothing() -> None:
    counting = Timings()

    def count() -> None:
        for _ in range(2000):
            counting.token(0.01)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counting.told()["timings"]["token_s"]["counts"]) == 8000


@given(st.lists(st.floats(0.0, 600.0), min_size=1, max_size=200))
def test_the_median_is_in_the_bucket_of_the_true_one(values: list[float]) -> None:
    counting = Timings()
    for value in values:
        counting.first_token(value, warm=False)
    found = median(FIRST_TOKEN_S, counting.told()["timings"]["first_token_cold_s"]["counts"])
    true = sorted(values)[(len(values) - 1) // 2]
    assert found is not None
    bucket = next(index for index, bound in enumerate(FIRST_TOKEN_S) if true <= bound)
    assert (FIRST_TOKEN_S[bucket - 1] if bucket else 0.0) <= found <= FIRST_TOKEN_S[bucket]


def test_a_median_of_nothing_is_none_and_beyond_the_last_bound_is_that_bound() -> None:
    assert median((1.0, 2.0), [0, 0, 0]) is None
    assert median((1.0, 2.0), [0, 0, 5]) == 2.0


@pytest.mark.parametrize(
    "beat", [{}, {"timings": 7, "answers": []}, {"timings": {"token_s": {"counts": [1], "sum": None}}}]
)
def test_a_beat_in_another_form_counts_as_nothing(beat: dict[str, Any]) -> None:
    assert counted(beat) == counted({})


def test_totals_outlive_their_servers() -> None:
    totals, counters = Totals(), Counters()
    for ended in range(3):
        for requests in range(1, 4):
            counters.timings.asked()
            counters.timings.ended(None)
            totals.heard({"prompt_tokens": 100 * requests, **counters.timings.told()})
            assert totals.seen()["answers"]["ok"] == 3 * ended + requests
            assert totals.seen()["tokens"]["prompt_tokens"] == 300 * ended + 100 * requests
        totals.ends()
        counters = Counters()
    assert totals.seen()["answers"]["ok"] == 9


def test_what_a_server_had_not_answered_when_it_ended_was_cut() -> None:
    totals, counting = Totals(), Timings()
    for _ in range(3):
        counting.asked()
    counting.ended(None)
    totals.heard(counting.told())
    assert totals.seen()["answers"] == {**dict.fromkeys(OUTCOMES, 0), "ok": 1}
    totals.ends()
    totals.ends()
    assert totals.seen()["answers"] == {**dict.fromkeys(OUTCOMES, 0), "ok": 1, "cut": 2}
    totals.heard(Timings().told())
    totals.ends()
    assert totals.seen()["answers"]["cut"] == 2


def a_status(**changes: Any) -> dict[str, Any]:
    process = {"pid": 1, "uptime_s": 2.5, "rss_bytes": 10**7}
    return {
        "state": "ready",
        "backend": "mlx",
        "model": {"id": "m", "path": "/m"},
        "supervisor": process,
        "server": process,
        "standby": None,
        "activity": {"in_flight": 1, "queued": 2},
        "kv_cache": {"dir": "/kv", "entries": 3, "bytes": 4, "limit_bytes": None},
        "ranks": [],
        **changes,
    }


def rendered(**changes: Any) -> dict[str, Any]:
    text = metrics.render(a_status(**changes), counted({}), {"hang": 2})
    return {family.name: family for family in text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]


def test_the_families_are_a_promise_and_what_is_not_known_is_left_out() -> None:
    families = rendered()
    assert {name.removeprefix("mlx_launch").lstrip("_"): family.type for name, family in families.items()} == {
        "": "info",
        "state": "stateset",
        "up": "gauge",
        "uptime_seconds": "gauge",
        "server_uptime_seconds": "gauge",
        "requests": "counter",
        "prompt_tokens": "counter",
        "cached_tokens": "counter",
        "completion_tokens": "counter",
        "time_to_first_token_seconds": "histogram",
        "token_seconds": "histogram",
        "in_flight": "gauge",
        "queued": "gauge",
        "kv_cache_entries": "gauge",
        "kv_cache_bytes": "gauge",
        "kv_cache_limit_bytes": "gauge",
        "kv_cache_memory_bytes": "gauge",
        "server_restarts": "counter",
        "memory_bytes": "gauge",
        "rank_memory_bytes": "gauge",
    }
    assert families["mlx_launch_kv_cache_limit_bytes"].samples == []
    assert [sample.labels["process"] for sample in families["mlx_launch_memory_bytes"].samples] == [
        "server",
        "supervisor",
    ]
    restarts = {sample.labels["reason"]: sample.value for sample in families["mlx_launch_server_restarts"].samples}
    assert restarts == {"hang": 2, **dict.fromkeys(["crash", "freeze", "memory", "asked", "rollback", "demand"], 0)}
    buckets = [sample for sample in families["mlx_launch_token_seconds"].samples if sample.name.endswith("_bucket")]
    assert len(buckets) == len(BOUNDS["token_s"]) + 1


def test_ranks_are_told_apart_by_number_and_machine() -> None:
    ranks = [
        {"rank": 0, "host": "127.0.0.1", "rss_bytes": 2_000_000},
        {"rank": 1, "host": "mac-2", "rss_bytes": 3_000_000},
        {"rank": 2, "host": "mac-3", "rss_bytes": None},
    ]
    samples = rendered(ranks=ranks)["mlx_launch_rank_memory_bytes"].samples
    assert [(sample.labels, sample.value) for sample in samples] == [
        ({"rank": "0", "host": "127.0.0.1"}, 2e6),
        ({"rank": "1", "host": "mac-2"}, 3e6),
    ]


@pytest.mark.parametrize("state", ["starting", "ready", "idle", "degraded", "restarting", "failed", "stopped"])
def test_one_state_holds(state: str) -> None:
    samples = rendered(state=state, server=None)["mlx_launch_state"].samples
    assert [sample.labels["mlx_launch_state"] for sample in samples if sample.value] == [state]


def test_the_memory_of_a_cluster_is_that_of_its_processes_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "rss_bytes", {7: 10}.get)
    record, leader = Record(), SimpleNamespace(pid=7, began=0.0, drains=True, ranks_here=[0, 2])
    ranks = [{"rank": number, "rss_bytes": count} for number, count in enumerate((100, 1000, None))]
    record.hear({"rss_bytes": 100, "ranks": ranks})
    seen: Any = record.server(cast("Server", leader), 0)
    assert seen["rss_bytes"] == 110


@given(st.text(max_size=30))
def test_any_name_of_a_model_is_read_back_as_it_was(name: str) -> None:
    (sample,) = rendered(model={"id": name, "path": "/m"})["mlx_launch"].samples
    assert sample.labels["model"] == name.encode("utf-8", "replace").decode()


@given(st.binary(max_size=200))
def test_no_head_of_a_request_is_more_than_a_status(head: bytes) -> None:
    assert look(head) in (200, 400, 403, 404, 405)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((), 200),
        (("Origin: http://localhost:9108",), 200),
        (("Sec-Fetch-Site: none",), 200),
        (("Sec-Fetch-Site: same-origin", "Origin: http://LOCALHOST:9108"), 200),
        (("Origin: http://evil.example",), 403),
        (("Origin: http://localhost:3000",), 403),
        (("Origin: https://localhost:9108",), 403),
        (("Origin: null",), 403),
        (("Sec-Fetch-Site: cross-site",), 403),
        (("Sec-Fetch-Site: same-site",), 403),
    ],
)
def test_a_page_of_another_origin_reads_nothing(fields: tuple[str, ...], status: int) -> None:
    head = "\r\n".join(["GET /metrics HTTP/1.1", "Host: localhost:9108", *fields])
    assert look(head.encode()) == status
