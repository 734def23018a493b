"""Every model family: answers token for token those of mlx-lm's own generation, cold, from the disk, and beyond a window."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.families import PROMPTS, TOKENS, reference
from support.hosts import Host
from support.launched import Reply, chat
from support.waiting import free_port

from mlx_launcher.demo import FAMILIES, build_random

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by tests/e2e/test_families.py -->", "<!-- end of families -->"


class Outcome(NamedTuple):
    """What one family answered, and what mlx-lm alone answers."""

    expected: list[str]
    expected_second: list[str]
    cold: list[Reply]
    warm: list[Reply]
    second: list[Reply]
    restarted: list[Reply]


def serve(family: str, directory: Path) -> Outcome:
    model = build_random(directory / family, family)
    first_turns: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = reference(model, first_turns)
    second_turns = [
        [*turn, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        for turn, answer in zip(first_turns, expected, strict=True)
    ]
    cache, place = {"min_tokens": 20}, directory / "kvcache"
    with Host(model, free_port(), place, cache=cache) as host:
        cold, warm, second = (
            [chat(host.port, turn, max_tokens=TOKENS) for turn in turns]
            for turns in (first_turns, first_turns, second_turns)
        )
    with Host(model, free_port(), place, cache=cache) as host:
        restarted = [chat(host.port, turn, max_tokens=TOKENS) for turn in second_turns]
    return Outcome(expected, reference(model, second_turns), cold, warm, second, restarted)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {family: serve(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def texts(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_mlx_lm_does(outcomes: dict[str, Outcome], family: str) -> None:
    outcome = outcomes[family]
    assert len(set(outcome.expected)) == len(PROMPTS), "the model answers everything alike: this would prove nothing"
    assert texts(outcome.cold) == outcome.expected
    assert texts(outcome.warm) == outcome.expected
    assert texts(outcome.second) == outcome.expected_second
    assert texts(outcome.restarted) == outcome.expected_second


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_on_from_the_disk(outcomes: dict[str, Outcome], family: str) -> None:
    outcome = outcomes[family]
    for cold, warm, second, restarted in zip(
        outcome.cold[1:], outcome.warm[1:], outcome.second[1:], outcome.restarted[1:], strict=True
    ):
        prompt_tokens = cold.json["usage"]["prompt_tokens"]
        assert (cold.cached, warm.cached) == (0, prompt_tokens - 1)
        assert second.cached >= prompt_tokens - 1
        assert restarted.cached >= prompt_tokens - 1


def test_the_table_in_the_documentation_is_what_was_run(outcomes: dict[str, Outcome]) -> None:
    """With UPDATE_DOCS=1 it is written."""
    kinds = {"gpt_oss": "sliding window", "gemma3_text": "sliding window", "qwen3_next": "hybrid"}
    rows = ["| family | state | answers as mlx-lm's own | from the disk |", "|---|---|---|---|"]
    for family, outcome in outcomes.items():
        same = texts(outcome.cold) == outcome.expected and texts(outcome.restarted) == outcome.expected_second
        warm = all(reply.cached for reply in outcome.restarted[1:])
        rows.append(
            f"| {family} | {kinds.get(family, 'plain')} | {'yes' if same else 'no'} | {'yes' if warm else 'no'} |"
        )
    page = DOCUMENT.read_text()
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    written = f"{head}{BEGIN}\n{chr(10).join(rows)}\n{END}{tail}"
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(written)
    assert written == page, "run this test with UPDATE_DOCS=1"
