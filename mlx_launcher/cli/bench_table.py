"""The table of `mlx-launch bench`: medians and spreads, at most 80 columns wide."""

import statistics
from collections.abc import Callable, Iterator, Sequence

from mlx_launcher.bench.client import Answer
from mlx_launcher.bench.figures import Outcome, Spread, Stored
from mlx_launcher.bench.measure import Measured
from mlx_launcher.cli.output import clean
from mlx_launcher.cli.screen import fit, size

_LABEL = 26
_COLUMN = 18
_COLUMNS = 3  # of backends in one table; more go into another one below


def lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The table, three backends beside each other."""
    for start in range(0, len(outcomes), _COLUMNS):
        if start:
            yield ""
        yield from _block(outcomes[start : start + _COLUMNS])
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        yield ""
    for outcome in failed:
        assert outcome.error  # noqa: S101
        yield clean(f"{outcome.name}: {outcome.error.message}")


def _block(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield _line("", [fit(clean(outcome.name), _COLUMN - 2) for outcome in outcomes])
    for label, cell in _ROWS:
        cells = [cell(outcome.measured, outcome.stored) if outcome.measured else "failed" for outcome in outcomes]
        yield _line(label, cells)


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}{''.join(f'{cell:>{_COLUMN}}' for cell in cells)}".rstrip()


def _seconds(answers: Sequence[Answer]) -> str:
    return _median([answer.total_s for answer in answers], " s")


def _median(values: Sequence[float | None], unit: str) -> str:
    spread = Spread.of(values)
    if spread is None:
        return "-"
    # One value says nothing of how far others would be from it.
    around = f"±{spread.part * 100:.0f} %" if len(values) > 1 else ""
    return f"{digits(spread.median)}{unit} {around:>6}"


def _cached(answers: Sequence[Answer]) -> str:
    cached = Spread.of([answer.cached_tokens for answer in answers])
    of = Spread.of([answer.prompt_tokens for answer in answers])
    return f"{cached.median:,.0f} ({cached.median / of.median:.0%})".replace("%", " %") if cached and of else "-"


def _faster(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """How many times faster the second is, conversation by conversation."""
    ratios = [one.total_s / other.total_s for one, other in zip(before, after, strict=True)]
    return f"{digits(statistics.median(ratios))}×"


def _tokens(answers: Sequence[Answer]) -> str:
    spread = Spread.of([answer.prompt_tokens for answer in answers])
    return f"{spread.median:,.0f}" if spread else "-"


def digits(value: float) -> str:
    """Three digits, which is more than a measurement is worth, and no exponent: 0.0312, 1.25, 98.7, 1,204."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    places = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3 if abs(value) >= 0.1 else 4
    return f"{value:.{places}f}"


_ROWS: tuple[tuple[str, Callable[[Measured, Stored | None], str]], ...] = (
    ("prompt tokens", lambda measured, _: _tokens(measured.first)),
    ("first request", lambda measured, _: _seconds(measured.first)),
    ("follow-up", lambda measured, _: _seconds(measured.follow_up)),
    ("  faster than the first", lambda measured, _: _faster(measured.first, measured.follow_up)),
    ("  cached tokens", lambda measured, _: _cached(measured.follow_up)),
    ("follow-up after a restart", lambda measured, _: _seconds(measured.after_restart)),
    ("  faster than the first", lambda measured, _: _faster(measured.first, measured.after_restart)),
    ("  cached tokens", lambda measured, _: _cached(measured.after_restart)),
    ("prefill, tokens", lambda measured, _: _median([answer.prefill_rate for answer in measured.first], "/s")),
    ("decoding, tokens", lambda measured, _: _median([answer.decode_rate for answer in measured.long], "/s")),
    ("cache files", lambda _, stored: f"{stored.files:,}" if stored else "-"),
    ("cache bytes", lambda _, stored: size(stored.bytes) if stored else "-"),
)
