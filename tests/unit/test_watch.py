"""The picture of `status --watch` for states of all kinds: it fits, and it says what is known."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.cli.screen import columns
from mlx_launcher.cli.watch_screen import Rate, picture

AT = 1_795_356_000.0  # 2026-11-22T14:00:00Z


def a_status(**changes: Any) -> dict[str, Any]:
    return {
        "state": "ready",
        "phase": None,
        "progress": None,
        "draining": False,
        "port": 8081,
        "backend": "mlx",
        "configured_backend": "mlx",
        "model": {"id": "qwen3-coder-30b", "path": "/models/q"},
        "supervisor": {"pid": 1, "uptime_s": 9.0, "rss_bytes": 14_000_000},
        "server": {"pid": 2, "uptime_s": 7500.0, "rss_bytes": 18_000_000_000, "restarts": 0, "last_exit": None},
        "standby": {"pid": 3, "rss_bytes": 210_000_000},
        "activity": {
            "in_flight": 1,
            "queued": 2,
            "requests": 1234,
            "idle_s": 0.0,
            "prompt_tokens": 1000,
            "cached_tokens": 830,
            "completion_tokens": 50,
        },
        "speed": {
            "first_token_cold_s": 12.3,
            "first_token_warm_s": 0.42,
            "last_answer_tokens_per_s": 40.1,
            "last_minute_tokens_per_s": 39.8,
        },
        "kv_cache": {"dir": "/kv", "entries": 37, "bytes": 2_100_000_000, "limit_bytes": 40_000_000_000},
        "last_error": None,
        "notes": [],
        "events": [{"at": "2026-11-22T13:58:00Z", "event": "ready", "server": 2}],
        **changes,
    }


def text(status: dict[str, Any], rate: float | None = 41.2, **more: Any) -> str:
    return "\n".join(picture(status, rate, AT, 79, 24, **more))


def test_it_says_what_a_user_looks_for() -> None:
    shown = text(a_status())
    for said in (
        "port 8081: ready",
        "1 in flight, 2 queued, 1,234 done",
        "41 now, pauses included; 40 while decoding (last minute)",
        "12 s cold, 0.42 s warm",
        "83 % of the prompts' tokens, 37 entries, 2.1 GB of 40 GB\n",
        "server 18 GB, standby 210 MB, supervisor 14 MB",
        "2 min 0 s  ready server=2",
    ):
        assert said in shown


def test_a_load_has_a_bar_and_an_idle_server_nothing() -> None:
    loading = a_status(state="starting", phase="loading", progress={"done": 5 * 10**8, "total": 10**9}, standby=None)
    assert "loading  [##########..........]  50%  500 MB of 1.0 GB" in text(loading)
    assert "nothing is loaded" in text(a_status(state="idle", server=None))


def test_troubles_are_rows() -> None:
    cache = {"dir": None, "entries": 0, "bytes": 0, "limit_bytes": None, "problem": "the disk is full"}
    shown = text(a_status(kv_cache=cache, notes=["warming up: 1 of 2"], last_error="it crashed"), trouble="no answer")
    for said in ("the disk is full", "warming up: 1 of 2", "it crashed", "no answer"):
        assert said in shown


def test_a_server_that_tells_nothing_has_dashes() -> None:
    shown = text({**a_status(), "speed": {}}, None)
    assert "- now, pauses included; - while decoding" in shown
    assert "- cold, - warm" in shown


def test_at_80_columns_all_of_the_cache_is_there_and_with_more_room_more_words() -> None:
    most = {
        "dir": "/kv",
        "entries": 12_345,
        "bytes": 888 * 10**9,
        "limit_bytes": 999 * 10**9,
        "memory_bytes": 123 * 10**6,
    }
    status = a_status(kv_cache=most, activity={**a_status()["activity"], "cached_tokens": 1000})
    assert "cache       100 % reused, 12,345 entries, 888 GB of 999 GB, 123 MB in memory\n" in text(status)
    wide = "\n".join(picture(status, 1.0, AT, 199, 50))
    assert "100 % of the prompts' tokens, 12,345 entries, 888 GB of 999 GB, 123 MB in memory\n" in wide
    path = "/models/" + "long/" * 20
    assert path in "\n".join(picture(a_status(model={"id": path, "path": path}), 1.0, AT, 199, 50))


def test_what_is_not_known_is_no_zero() -> None:
    cache = {"dir": None, "entries": 0, "bytes": 0, "limit_bytes": None, "memory_bytes": 0}
    nothing = dict.fromkeys(a_status()["activity"], 0)
    assert "  cache       - of the prompts' tokens, - entries\n" in text(a_status(kv_cache=cache, activity=nothing))
    one = {**cache, "dir": "/kv", "entries": 1}
    assert "tokens, 1 entry, 0 B\n" in text(a_status(kv_cache=one, activity=nothing))


def test_each_rank_of_a_cluster_has_a_row_and_all_a_sum() -> None:
    ranks = [
        {
            "rank": number,
            "host": f"mac-{number}",
            "pid": 7,
            "state": "ready",
            "rss_bytes": 10**9,
            "last_progress_s": None,
        }
        for number in range(2)
    ]
    shown = text(a_status(ranks=ranks, standby=None))
    assert "server 18 GB, supervisor 14 MB, all ranks 2.0 GB" in shown
    assert "  rank 1      mac-1, ready, pid 7, 1.0 GB" in shown
    ranks[1]["rss_bytes"] = None  # it has not said so yet
    assert "all ranks" not in text(a_status(ranks=ranks))


@given(st.integers(10, 80), st.integers(1, 30), st.text(max_size=120))
def test_it_fits_whatever_it_says(width: int, height: int, anything: str) -> None:
    events = [{"at": anything, "event": anything, "reason": anything}] * 10
    status = a_status(model={"id": anything, "path": "/"}, last_error=anything, notes=[anything], events=events)
    lines = picture(status, 1.0, AT, width, height, anything)
    assert len(lines) <= height
    assert max(map(columns, lines)) <= width


@pytest.mark.parametrize(
    ("tokens", "rates"),
    [
        ([0, 40, 80], [None, 40.0, 40.0]),
        ([100, 100, 100], [None, 0.0, 0.0]),
        ([100, 140, 0, 20], [None, 40.0, None, 20.0]),  # another server
        ([0, 10, 20, 30, 80], [None, 10.0, 10.0, 10.0, 70 / 3]),
    ],
)
def test_the_rate_is_of_the_last_seconds(tokens: list[int], rates: list[float | None]) -> None:
    rate = Rate()
    seen = [rate.seen(float(at), {"activity": {"completion_tokens": count}}) for at, count in enumerate(tokens)]
    assert seen == [None if wanted is None else pytest.approx(wanted) for wanted in rates]
