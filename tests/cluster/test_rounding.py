"""Ranks that share a layer add its parts up in another order than one machine does: what that changes, and what it does not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from support.hosts import Host
from support.launched import chat
from support.ranks import THROUGH, cluster_host, program
from support.waiting import free_port

QUESTIONS = [f"Question {number}: " + "tell me more. " * (number % 7) for number in range(20)]
Answer = list[tuple[str, float]]  # tokens with the logarithms of their probabilities


def converted(model: Path, to: Path, *how: str) -> Path:
    words = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "--mlx-path", str(to), *how]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    return to


def answers(host: Host) -> list[Answer]:
    def ask(question: str) -> Answer:
        choice: dict[str, Any] = chat(host.port, question, max_tokens=24, logprobs=True, top_logprobs=1).json[
            "choices"
        ][0]
        return [(token["token"], token["logprob"]) for token in choice["logprobs"]["content"]]

    return [ask(question) for question in QUESTIONS]


def of_one(model: Path, directory: Path) -> list[Answer]:
    with Host(model, free_port(), directory / "none", backend="legacy") as host:
        return answers(host)


def of_two(model: Path, directory: Path) -> list[Answer]:
    with cluster_host(model, directory, program(directory, THROUGH)) as host:
        return answers(host)


def texts(found: list[Answer]) -> list[list[str]]:
    return [[token for token, _ in answer] for answer in found]


def distance(some: list[Answer], others: list[Answer]) -> float:
    """The mean difference of the first tokens' logarithms, where the tokens are the same."""
    pairs = [(a[0], b[0]) for a, b in zip(some, others, strict=True) if a[0][0] == b[0][0]]
    assert len(pairs) > len(some) / 2
    return sum(abs(a[1] - b[1]) for a, b in pairs) / len(pairs)


def test_packed_weights_token_for_token_in_float32(llama: Path, tmp_path: Path) -> None:
    model = converted(llama, tmp_path / "q4", "-q", "--q-bits", "4", "--q-group-size", "32", "--dtype", "float32")
    assert texts(of_two(model, tmp_path)) == texts(of_one(model, tmp_path))


def test_bfloat16_is_as_far_from_the_truth_as_one_machines(llama: Path, tmp_path: Path) -> None:
    """With seven bits of mantissa any other order gives other tokens; so would one machine that added up otherwise."""
    coarse = converted(llama, tmp_path / "bf16", "--dtype", "bfloat16")
    exact = of_one(converted(coarse, tmp_path / "f32", "--dtype", "float32"), tmp_path)
    assert distance(of_two(coarse, tmp_path), exact) < 1.5 * distance(of_one(coarse, tmp_path), exact)
