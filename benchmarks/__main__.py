"""Every measurement after the other, each in a process of its own: `python -m benchmarks [NAME …]`, or `make bench`.

Writes benchmarks/RESULTS.md; with names, only those are run and the page goes to standard output. Exit 1 if one failed.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.row import Row
from mlx_launcher.doctor.python import device
from mlx_launcher.system import machine as system

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
# As they stand on the page; others follow.
ORDER = ("follow_up", "restart", "disk", "decode", "prefill", "http", "first_token", "small")
_PROBE_S = 60.0
PACKAGES = ("mlx-launcher", "mlx", "mlx-lm", "mlx-textgen")


def main(names: Sequence[str]) -> int:
    known = modules()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"There is no measurement {', '.join(unknown)}. There are: {', '.join(known)}", file=sys.stderr)
        return 2
    rows, failed = list[Row](), 0
    chosen = [name for name in known if name in names] or known
    for number, name in enumerate(chosen, 1):
        print(f"[{number} of {len(chosen)}] {name} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        found, reason = run(name)
        failed += bool(reason)
        rows += found
        print(f"    {reason or 'done'}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    text = "\n".join(page(rows)) + "\n"
    if names:
        print(text)
    else:
        RESULTS.write_text(text)
        README.write_text(with_results(README.read_text(), rows))
        print(f"written: {RESULTS} and the table in {README}", file=sys.stderr)
    return 1 if failed else 0


def modules() -> list[str]:
    """Those that have something to measure, without importing them: some import MLX."""
    there = sorted(file.stem for file in HERE.glob("*.py") if "\ndef measure() ->" in file.read_text())
    return [*(name for name in ORDER if name in there), *(name for name in there if name not in ORDER)]


def run(name: str) -> tuple[list[Row], str]:
    """Its rows, and why it failed where it did; then a row that says so is among them."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", "--json"],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate()
    except KeyboardInterrupt:
        # It was interrupted too, and has servers to end and folders to remove: subprocess.run would kill it before it had.
        process.communicate()
        raise
    rows = [Row(**json.loads(line)) for line in out.splitlines() if line.startswith("{")]
    if process.returncode == 0 and rows:
        return rows, ""
    said = [line for line in err.splitlines() if line.strip()]
    reason = said[-1].strip() if said else f"it ended with {process.returncode} and without a row"
    return [*rows, Row(name, "", "", None, False, "not measured", f"failed: {reason}")], f"failed: {reason}"


def page(rows: Sequence[Row]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Written by `make bench`. Every ratio is one of medians, from one run in which both sides were measured in turn."
    yield ""
    yield from (f"- {line}" for line in machine())
    yield ""
    yield "| measure | against | goal | measured | reached | detail |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield _line(row.measure, row.against, row.goal, _measured(row), _reached(row), row.detail)
    missed = [row for row in rows if not row.reached]
    yield ""
    yield "## Not reached"
    yield ""
    if not missed:
        yield "Every goal was reached."
    for row in missed:
        why = row.why or "the reason is not known yet"
        yield f"- **{row.measure}** ({row.goal}, {_reached(row)}): {why}"


def with_results(readme: str, rows: Sequence[Row]) -> str:
    """The README with its table made anew: what was measured against what, the goal, and where the rest stands."""
    head, _, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{README} has no lines {BEGIN} and {END}")
    table = ["| measure | against | measured | goal | reached |", "|---|---|---|---|---|"]
    for row in rows:
        table.append(_line(row.measure, row.against, _measured(row), row.goal, _reached(row)))
    said = [f"- {line}" for line in machine()]
    more = "Medians, spreads and the reasons of what was missed: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    return f"{head}{BEGIN}\n{chr(10).join([*table, '', *said, '', more])}\n{END}{tail}"


def _measured(row: Row) -> str:
    return row.value or ("–" if row.ratio is None else f"{_ratio(row.ratio)}×")


def _reached(row: Row) -> str:
    """Yes, or by how much it was missed where the goal is a ratio of medians."""
    if row.reached:
        return "yes"
    if row.ratio is None:
        return "not measured"
    sign, _, number = row.goal.partition(" ")
    if not number.endswith("×"):
        return "no"
    goal = float(number.removesuffix("×"))
    by = (goal - row.ratio) / goal if sign == "≥" else (row.ratio - goal) / goal
    return f"missed by {by * 100:.1f} %"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def machine() -> Iterator[str]:
    """What was measured on and when."""
    memory = psutil.virtual_memory().total / (1 << 30)
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}, {platform.machine()}"
    yield f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {kernel}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    # Names the card where there is one.
    yield device(system.machine(), {}, _PROBE_S).found
    yield f"Python {platform.python_version()}, {versions}"
    yield f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def _processor() -> str:
    """The model's name as the system has it."""
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
