"""Two ranks of one model, one of them behind what stands in for ssh; tests/cluster has the rest (make test-cluster)."""

from pathlib import Path
from typing import Any

import psutil
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
