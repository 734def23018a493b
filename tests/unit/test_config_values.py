"""Durations and sizes as people write them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.config.values import DURATION_PATTERN, SIZE_PATTERN, duration_text, seconds, size


@pytest.mark.parametrize(
    ("written", "meant"),
    [(0, 0), (120000, 120), (1.5, 0.0015), ("30s", 30), ("500ms", 0.5), ("5m", 300), ("5 min", 300), ("2h", 7200)],
)
def test_durations(written: object, meant: float) -> None:
    assert seconds(written) == pytest.approx(meant)


@pytest.mark.parametrize(
    "written", ["30", "", "s", "-1s", -1, "1e3s", "٣s", True, None, [], float("nan"), 1e300, "9999d"]
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError, match=r"a duration .*is wanted"):
        seconds(written)


@pytest.mark.parametrize(
    ("written", "meant"),
    [(0, 0), (123, 123), ("40GB", 40 * 10**9), ("40 gb", 40 * 10**9), ("1.5MiB", 3 * 2**19), ("7B", 7), ("2kB", 2000)],
)
def test_sizes(written: object, meant: int) -> None:
    assert size(written) == meant


@pytest.mark.parametrize("written", ["40", "GB", "-1GB", -1, 1.5, True, None, 2**61, "9999999TB"])
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError, match=r"a size .*is wanted"):
        size(written)


@given(st.floats(min_value=0, max_value=3e8))
def test_a_duration_shown_can_be_read_again(value: float) -> None:
    text = duration_text(round(value, 3))
    if "e" not in text:
        assert seconds(text) == pytest.approx(round(value, 3), rel=1e-5)


@pytest.mark.parametrize("text", ["30s", "500 ms", "5m", "1.5h", "30", "x", "5M", "1e3s"])
def test_the_patterns_of_the_schema_say_the_same(text: str) -> None:
    def reads(read: object) -> bool:
        try:
            read(text)  # type: ignore[operator]
        except ValueError:
            return False
        return True

    assert bool(re.search(DURATION_PATTERN, text)) == reads(seconds)
    assert bool(re.search(SIZE_PATTERN, text)) == reads(size)


@pytest.mark.parametrize("text", ["40GB", "40gib", "1.5MiB", "7B", "2kB", "1XB", "B", "40"])
def test_the_pattern_of_sizes(text: str) -> None:
    try:
        size(text)
    except ValueError:
        assert not re.search(SIZE_PATTERN, text)
    else:
        assert re.search(SIZE_PATTERN, text)
