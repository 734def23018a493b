"""Two ranks of one model, one of them behind what stands in for ssh; tests/cluster has the rest (make test-cluster)."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.families import PROMPTS, TOKENS, reference
from support.launched import chat
from support.ranks import THROUGH, cluster_host, program
from support.waiting import until


def test_two_ranks_answer_as_one_machine_and_leave_nothing(random_model: Path, tmp_path: Path) -> None:
    turns: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with cluster_host(random_model, tmp_path, program(tmp_path, THROUGH)) as host:
        assert list(dict.fromkeys(host.phases)) == ["importing", "loading", "proving"]
        answers = [chat(host.port, turn, max_tokens=TOKENS).text for turn in turns]
        rows = until(lambda: host.counters.get("ranks"), 10, "rows")
        assert [(row["host"], row["state"]) for row in rows] == [("127.0.0.1", "ready"), ("other", "ready")]
    # mlx-lm's streaming detokenizer drops a leading space.
    assert answers == [text.removeprefix(" ") for text in reference(random_model, turns)]
    until(lambda: not any(psutil.pid_exists(row["pid"]) for row in rows), 10, "the end of both ranks")


def test_a_frozen_rank_0_shows_its_age_before_it_is_named(random_model: Path, tmp_path: Path) -> None:
    with_ranks = cluster_host(random_model, tmp_path, program(tmp_path, THROUGH))
    try:
        rows = until(lambda: with_ranks.ready and with_ranks.counters.get("ranks"), 60, "rows")
        os.kill(rows[0]["pid"], signal.SIGSTOP)
        until(lambda: with_ranks.counters["ranks"][0]["last_progress_s"] >= 3, 8, "its age")
        end = until(lambda: with_ranks.end, 10, "its name")
        assert (end["type"], end["frozen"]) == ("dying", True)
        assert end["reason"].startswith("rank 0 on this machine: it froze")
        assert with_ranks.process.wait(10) == 1
    finally:
        with_ranks.kill()


@pytest.mark.parametrize(
    ("ssh", "said", "final"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key verification failed.", True),
        ("echo 'me@other: Permission denied (publickey).' >&2; exit 255", "Permission denied (publickey).", True),
        ("exec sh -c '/nowhere/python -m there'", "/nowhere/python", True),
        ("echo 'ssh: connect to host other port 22: Connection refused' >&2; exit 255", "Connection refused", False),
    ],
)
def test_what_another_try_does_not_mend_is_a_fault(
    random_model: Path, tmp_path: Path, ssh: str, said: str, final: bool
) -> None:
    host = cluster_host(random_model, tmp_path, program(tmp_path, f"#!/bin/sh\n{ssh}\n"))
    try:
        end = until(lambda: host.end, 30, "what is wrong")
        assert (end["type"], end["frozen"]) == ("fault" if final else "dying", False)
        assert said in end["reason"]
        assert bool(end["hint"]) == final
        assert host.process.wait(10) == 1
    finally:
        host.kill()
