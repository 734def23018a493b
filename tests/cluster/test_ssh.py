"""What the other end of an ssh connection may do, with programs that stand in for it."""

import sys
import time
from pathlib import Path

import pytest
from support.clusters import TABLE
from support.ranks import THROUGH, cluster_host, program
from support.waiting import until

from mlx_launcher.host.reports import versions

REFUSED = "#!/bin/sh\necho 'ssh: connect to host other port 22: Connection refused' >&2\nexit 255\n"
SILENT = "#!/bin/sh\nexec sleep 60\n"
NO_PYTHON = THROUGH.replace('"$word"', '"/nowhere/python -m mlx_launcher.host rank"')
# Says a line, waits for the settings, says another.
RANK = """#!PYTHON
import json, sys, time
sys.stdin.readline()
print(json.dumps({"type": "imported", "versions": VERSIONS}), flush=True)
while "activate" not in sys.stdin.readline():
    pass
print(json.dumps({"type": "joining", "fingerprint": "another"}), flush=True)
time.sleep(60)
"""


def rank(said: dict[str, str | None]) -> str:
    return RANK.replace("PYTHON", sys.executable).replace("VERSIONS", repr(said))


OLD = {**versions(), "mlx": "0.31.0"}


@pytest.mark.parametrize(
    ("ssh", "said"),
    [
        (REFUSED, "rank 1 on other: the ssh connection ended: ssh: connect to host other port 22: Connection refused"),
        (SILENT, "rank 1 on other: it cannot be reached: nothing was heard of it for 7 s"),
        (NO_PYTHON, "/nowhere/python"),
        (rank(OLD), "rank 1 on other has other versions than rank 0: mlx 0.31.0 instead of "),
        (rank(versions()), "rank 1 on other has another model at "),
    ],
    ids=["refused", "silent", "no python", "versions", "model"],
)
def test_named_at_start(llama: Path, tmp_path: Path, ssh: str, said: str, request: pytest.FixtureRequest) -> None:
    began = time.monotonic()
    host = cluster_host(llama, tmp_path, program(tmp_path, ssh))
    try:
        until(lambda: host.fault, 30, "the name")
        TABLE.append((f"at start, ssh: {request.node.callspec.id}", time.monotonic() - began, str(host.fault)))
        assert said in str(host.fault) or said in host.log()
        assert host.process.wait(10) == 1
    finally:
        host.kill()
