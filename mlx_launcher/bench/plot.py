"""The migration as a picture: what one waits for an answer, with each backend, in a form that a README can carry."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_launcher.errors import EXIT_USAGE, LaunchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg")

_ROWS = (
    ("first_request_s", "first request"),
    ("follow_up_s", "follow-up"),
    ("after_restart_s", "follow-up\nafter a restart"),
)
# Told apart by those who see no red or no green too (Okabe and Ito), and not white: a page may be dark around it.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_PAPER, _INK, _FAINT = "#FBFBF8", "#24292F", "#6B7280"
_INCHES, _DPI = 8.0, 200  # 1,600 pixels: twice the width of a README
_BAR, _GAP = 0.36, 0.45  # inches
_BELOW = 0.7
_AROUND = 1.75  # above the bars and below, in inches
_NAME_CHARS = 40
_FASTER = 1.5  # a follow-up that is not so many times faster than its first request gets no word of it


class _Bar(NamedTuple):
    """Seconds: the median, and between what the middle half of the values lies; `label` is what stands beside it."""

    at: float
    median: float
    low: float
    high: float
    colour: str
    label: str


def check(file: Path) -> None:
    """LaunchError where no picture could be written there, before an hour is spent on measuring."""
    if file.suffix.lower() not in KINDS:
        raise LaunchError("usage", f"--plot writes {' or '.join(KINDS)}, not {file.name!r}", "plot.png", EXIT_USAGE)
    if importlib.util.find_spec("matplotlib") is None:
        hint = f"{sys.executable} -m pip install 'matplotlib>=3.9'"
        raise LaunchError("no_matplotlib", "--plot needs matplotlib, which is not installed", hint)
    if not file.absolute().parent.is_dir():
        raise LaunchError("plot_failed", f"there is no directory {file.absolute().parent}", "Make it, or name another")


def draw(data: dict[str, Any], file: Path) -> None:
    """Writes the picture of what `mlx-launch bench --json` has as `data`. LaunchError `plot_failed` where that cannot be done."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    backends = [backend for backend in data["backends"] if backend["ok"]]
    if not backends:
        raise LaunchError("plot_failed", "there is nothing to draw: no backend could be measured")
    group = len(backends) * _BAR + _GAP
    height = _AROUND + len(_ROWS) * group
    # A name may hold a dollar, which is no formula.
    style: dict[Any, Any] = {"font.size": 11, "text.color": _INK, "text.parse_math": False, "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(_INCHES, height), facecolor=_PAPER)
        axes = figure.add_axes((0.185, _BELOW / height, 0.725, 1 - _AROUND / height), facecolor=_PAPER)
        bars = _bars(backends, group)
        _draw_bars(axes, bars)
        _draw_axes(axes, bars, group, len(backends))
        _draw_head(figure, data, [backend["name"] for backend in backends], height)
        try:
            figure.savefig(file, dpi=_DPI, facecolor=_PAPER)
        except OSError as error:
            raise LaunchError("plot_failed", f"{file} cannot be written: {error.strerror or error}") from error


def _draw_head(figure: "Figure", data: dict[str, Any], names: Sequence[str], height: float) -> None:
    from matplotlib.patches import Patch

    def below(inches: float) -> float:
        return 1 - inches / height

    figure.text(0.03, below(0.3), "Seconds until the answer is there", fontsize=14, fontweight="bold", va="center")
    figure.text(0.03, below(0.57), _subtitle(data), fontsize=9.5, color=_FAINT, va="center")
    figure.legend(
        handles=[Patch(color=_colour(number), label=name) for number, name in enumerate(names)],
        loc="center left",
        bbox_to_anchor=(0.02, below(0.86)),
        ncols=len(names),
        frameon=False,
        handlelength=0.8,
        handleheight=0.8,
        handletextpad=0.5,
        columnspacing=1.5,
    )


def _bars(backends: Sequence[dict[str, Any]], group: float) -> list[_Bar]:
    return [
        _Bar(
            row * group + number * _BAR,
            *(spread["median"], spread["low"], spread["high"]),
            _colour(number),
            _label(spread["median"], backend["first_request_s"]),
        )
        for row, (key, _) in enumerate(_ROWS)
        for number, backend in enumerate(backends)
        if (spread := backend[key])
    ]


def _label(median: float, first: dict[str, Any] | None) -> str:
    times = first["median"] / median if first and median else 0.0
    return f"{_seconds(median)}{f', {times:,.0f}× faster' if times >= _FASTER else ''}"


def _draw_bars(axes: "Axes", bars: Sequence[_Bar]) -> None:
    for bar in bars:
        axes.barh(bar.at, bar.median, height=_BAR * 0.86, color=bar.colour, zorder=2)
        axes.plot([bar.low, bar.high], [bar.at, bar.at], color=_INK, linewidth=1.2, alpha=0.65, zorder=3)
        axes.annotate(
            bar.label,
            (max(bar.median, bar.high), bar.at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            zorder=4,
        )


def _draw_axes(axes: "Axes", bars: Sequence[_Bar], group: float, count: int) -> None:
    axes.set_xlim(0, max(bar.high for bar in bars) * 1.15)
    axes.set_ylim(len(_ROWS) * group - _GAP, -_GAP)
    axes.set_yticks([row * group + (count - 1) * _BAR / 2 for row in range(len(_ROWS))], [label for _, label in _ROWS])
    axes.xaxis.set_major_formatter(lambda value, _: _seconds(value))
    axes.grid(axis="x", color="#D8DBDF", linewidth=0.8, zorder=0)
    axes.tick_params(axis="x", which="both", colors=_FAINT, length=0, labelsize=9.5)
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=_INK)
    axes.set_xlabel("shorter is better", color=_FAINT, fontsize=9.5, labelpad=6)
    axes.spines[:].set_visible(False)


def _subtitle(data: dict[str, Any]) -> str:
    prompts = [backend["prompt_tokens"]["median"] for backend in data["backends"] if backend["prompt_tokens"]]
    tokens = f"{max(prompts):,.0f}" if prompts else f"about {data['prompt_tokens']:,}"
    # The name alone: where somebody keeps his models is nobody's business.
    name = Path(data["model"]["id"]).name
    name = name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 3]}..."
    return f"{name}, prompts of {tokens} tokens; medians of {data['turns']}, thin lines: the middle half"


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _seconds(value: float) -> str:
    """Three digits at most, and no exponent: 0.031 s, 1.25 s, 98.7 s, 1,204 s."""
    if value >= 100:
        return f"{value:,.0f} s"
    places = 1 if value >= 10 else 2 if value >= 0.1 else 3
    text = f"{value:.{places}f}"
    return f"{text.rstrip('0').rstrip('.') or '0'} s"
