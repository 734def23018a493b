"""Prompts for a model whose answers depend on all of them."""

import random


def prose(seed: int, length: int) -> str:
    """Words that nothing else begins with, `length` characters of them."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnoprstuvwy", k=source.randint(2, 9))) for _ in range(length // 4)]
    return " ".join(words)[:length]
