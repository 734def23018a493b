"""What mlx-lm alone answers, to compare a server's answers with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
