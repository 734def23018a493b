"""Every model family: answers token for token those of mlx-lm's own generation, cold, from the disk, and beyond a window."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.hosts import Host
from support.launched import chat
from support.waiting import free_port

from mlx_launcher.demo import FAMILIES, build_random

# Windows of the sliding families are 32 tokens: a short prompt stays below, a long one is far beyond.
PROMPTS = ["Hi", "Tell me more. " * 6, "It was a dark and stormy night; the rain fell in torrents. " * 12]
TOKENS = 12

# mlx-lm alone, in a process that never imports mlx-textgen, because that replaces parts of mlx-lm.
REFERENCE = """
import json, sys
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
answers = []
for messages in json.load(sys.stdin):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens = [part.token for part in stream_generate(model, tokenizer, prompt, max_tokens=int(sys.argv[2]))]
    # Not the parts' texts: mlx-lm's detokenizer drops a leading space.
    answers.append(tokenizer.decode(tokens))
print(json.dumps(answers))
"""


def reference(model: Path, conversations: list[list[dict[str, Any]]]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(model), str(TOKENS)],
        input=json.dumps(conversations),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_mlx_lm_does(family: str, tmp_path: Path) -> None:
    model = build_random(tmp_path / family, family)
    first_turns: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = reference(model, first_turns)
    second_turns = [
        [*turn, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        for turn, answer in zip(first_turns, expected, strict=True)
    ]
    expected_second = reference(model, second_turns)
    assert len(set(expected)) == len(PROMPTS), "the model answers everything alike: this would prove nothing"

    directory = tmp_path / "kvcache"
    cache = {"min_tokens": 20}
    with Host(model, free_port(), directory, cache=cache) as host:
        cold = [chat(host.port, turn, max_tokens=TOKENS) for turn in first_turns]
        hot = [chat(host.port, turn, max_tokens=TOKENS) for turn in first_turns]
        second = [chat(host.port, turn, max_tokens=TOKENS) for turn in second_turns]
    assert [reply.text for reply in cold] == expected
    assert [reply.text for reply in hot] == expected
    assert [reply.text for reply in second] == expected_second
    with Host(model, free_port(), directory, cache=cache) as host:
        restarted = [chat(host.port, turn, max_tokens=TOKENS) for turn in second_turns]
    assert [reply.text for reply in restarted] == expected_second
    for reply, again, follow_up in zip(cold[1:], hot[1:], second[1:], strict=True):
        prompt_tokens = reply.json["usage"]["prompt_tokens"]
        assert again.cached == prompt_tokens - 1
        assert follow_up.cached >= prompt_tokens - 1
