"""One line of RESULTS.md, and how a measurement shows its lines: `python -m benchmarks.decode [--json]`."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from mlx_launcher.bench.figures import Spread

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What one ratio says. `ratio` is None where it could not be measured; `reached` is then False.

    `goal` is written as the table has it ("≥ 20×", "≤ 1.03×", "≤ 20 ms"). `detail` holds the two medians with units and spread
    and what was run: "1,204 against 1,251 tokens/s, medians of 5 (±3 %)". `why` is the reason of a goal that was not reached.
    `value` is what was measured where the goal is no ratio: "4.3 ms".
    """

    measure: str
    against: str
    goal: str
    ratio: float | None
    reached: bool
    detail: str
    why: str = ""
    value: str = ""


def of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The ratio of the two medians that a row shows."""
    return statistics.median(ours) / statistics.median(theirs)


def at_least(measure: str, against: str, goal: float, ratio: float, detail: str, why: str = "") -> Row:
    """A goal of the kind "≥ 20×"."""
    reached = ratio >= goal
    return Row(measure, against, f"≥ {goal:g}×", ratio, reached, detail, "" if reached else why)


def at_most(measure: str, against: str, goal: float, ratio: float, detail: str, why: str = "") -> Row:
    """A goal of the kind "≤ 1.03×"."""
    reached = ratio <= goal
    return Row(measure, against, f"≤ {goal:g}×", ratio, reached, detail, "" if reached else why)


def within(measure: str, against: str, goal: float, unit: str, value: float, ratio: float, detail: str) -> Row:
    """A goal of the kind "≤ 20 ms"; `ratio` is to what it is measured against, or to the goal where that is nothing."""
    return Row(measure, against, f"≤ {goal:g} {unit}", ratio, value <= goal, detail, value=f"{value:.3g} {unit}")


def spread(values: Sequence[float]) -> str:
    """How far the middle half of the values is from their median: "±3 %"."""
    found = Spread.of(values)
    assert found, "nothing was measured"
    return f"±{found.part * 100:.0f} %"


def interleaved(rounds: int, first: Callable[[int], T], second: Callable[[int], T]) -> tuple[list[T], list[T]]:
    """Both measured `rounds` times in turn (A B, then B A, …), so that what else the machine does meets both alike.

    Each is called with the round's number, from 0, and returns what it measured.
    """
    ours, theirs = list[T](), list[T]()
    for number in range(rounds):
        if number % 2:
            theirs.append(second(number))
            ours.append(first(number))
        else:
            ours.append(first(number))
            theirs.append(second(number))
    return ours, theirs


def show(rows: Sequence[Row]) -> None:
    """Prints the rows; with --json on the command line as one JSON object a line."""
    for row in rows:
        if "--json" in sys.argv[1:]:
            print(json.dumps(asdict(row), ensure_ascii=False), flush=True)
            continue
        measured = row.value or ("failed" if row.ratio is None else f"{row.ratio:.2f}×")
        print(f"{row.measure}, against {row.against}: {measured} (goal {row.goal}{', reached' if row.reached else ''})")
        print(f"    {row.detail}")
        if row.why:
            print(f"    {row.why}")
