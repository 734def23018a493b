"""One line of RESULTS.md, and how a measurement shows its lines: `python -m benchmarks.decode [--json]`."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What one ratio says. `ratio` is None where it could not be measured; `reached` is then False.

    `goal` is written as the table has it ("≥ 20×", "≤ 1.03×"). `detail` holds the two medians with units and spread and what
    was run: "1,204 against 1,251 tokens/s, medians of 5 (±3 %)". `why` is the reason of a goal that was not reached.
    """

    measure: str
    against: str
    goal: str
    ratio: float | None
    reached: bool
    detail: str
    why: str = ""


def at_least(measure: str, against: str, goal: float, ratio: float, detail: str, why: str = "") -> Row:
    """A goal of the kind "≥ 20×"."""
    reached = ratio >= goal
    return Row(measure, against, f"≥ {goal:g}×", ratio, reached, detail, "" if reached else why)


def at_most(measure: str, against: str, goal: float, ratio: float, detail: str, why: str = "") -> Row:
    """A goal of the kind "≤ 1.03×"."""
    reached = ratio <= goal
    return Row(measure, against, f"≤ {goal:g}×", ratio, reached, detail, "" if reached else why)


def spread(values: Sequence[float]) -> str:
    """How far the middle half of the values is from their median: "±3 %"."""
    middle = statistics.median(values)
    if len(values) < 2 or not middle:
        return "±0 %"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"±{max(high - middle, middle - low) / abs(middle):.0%}".replace("%", " %")


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
        measured = "failed" if row.ratio is None else f"{row.ratio:.2f}×"
        print(f"{row.measure}, against {row.against}: {measured} (goal {row.goal}{', reached' if row.reached else ''})")
        print(f"    {row.detail}")
        if row.why:
            print(f"    {row.why}")
