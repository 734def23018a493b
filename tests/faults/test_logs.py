"""Rows 16, 17, 47 and 53 of the list of faults: what a server writes, and what becomes of the files."""

import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.supervised import Launched
from support.waiting import until

Launch = Callable[..., Launched]
MEGABYTE = 10**6


def _no_file_may_grow() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("row", ["16 flood", "17 line"])
def test_16_17_what_floods_its_log_is_rotated_and_costs_no_memory(launch: Launch, row: str) -> None:
    """A flood of lines, and lines of 10 MB that are binary and no UTF-8."""
    launched = launch()
    launched.until_state("ready")
    process = psutil.Process(launched.process.pid)
    launched.get(f"/flood?{3 * MEGABYTE}")
    before = process.memory_info().rss
    for _ in range(1 if row == "16 flood" else 3):
        launched.get(f"/flood?{100 * MEGABYTE}" if row == "16 flood" else f"/line?{10 * MEGABYTE}")
    assert process.memory_info().rss - before < 1 << 20
    names = {"server.log", "server.log.1", "server.log.2", "server.log.3"}
    until(lambda: {path.name for path in launched.instance.glob("server.log*")} == names)
    sizes = {name: (launched.instance / name).stat().st_size for name in names}
    assert max(sizes.values()) <= launched.plan["log_max_bytes"]
    assert launched.status()["state"] == "ready"
    assert len(launched.server_pids()) == 1


def test_53_a_log_that_was_deleted_or_moved_is_begun_anew(launch: Launch, instance: Path) -> None:
    launched = launch(log_file=str(instance / "logs" / "server.log"))
    launched.until_state("ready")
    log = Path(launched.plan["log_file"])
    until(lambda: log.exists() and "fake host" in log.read_text())
    log.rename(log.with_suffix(".moved"))
    launched.get("/flood?1000")
    until(lambda: log.exists() and "flood" in log.read_text())
    log.unlink()
    log.parent.joinpath("server.moved").unlink()
    log.parent.rmdir()
    launched.get("/flood?1000")
    until(lambda: log.exists() and "flood" in log.read_text())


def test_53_the_journal_too(launch: Launch) -> None:
    launched = launch()
    launched.until_state("ready")
    (launched.instance / "journal.jsonl").unlink()
    launched.provoke("/die")
    launched.until_restarts(1)
    assert launched.events()[0] == "exit"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_47_a_full_disk_does_not_stop_the_service(launch: Launch) -> None:
    # Nothing can be written to the journal or state.json either.
    launched = launch(log_file="/dev/full", restart={"max_restarts": 9}, preexec=_no_file_may_grow)
    launched.until_state("ready")
    launched.get("/flood?100000")
    launched.provoke("/kill")
    launched.until_restarts(1)
    status = launched.until_state("ready")
    assert [e["reason"] for e in status["events"] if e["event"] == "log_trouble"] == ["No space left on device"]
    assert launched.stop() == 0
