"""Prompts of a given length in tokens, each new to the server from its first word on."""

from collections.abc import Callable
from random import Random

from mlx_launcher.errors import LaunchError

# Plain and short: tokenizers agree on such.
_TEXT = (
    "apple beach chair dance eagle field grape house island juice knife lemon maple night ocean piano quiet river stone "
    "table under voice water young zebra amber brick cloud dream earth flame green heart ivory jewel light music noble "
    "olive paper queen round smile train urban value wheat yield bread clock drift eager frost glass honey input"
)
WORDS = _TEXT.split()
_PROBES = (len(WORDS), 5 * len(WORDS))


def words(number: int, count: int) -> str:
    """`count` words, always the same for a number, and from the first word on others than for any other number.

    All words come equally often, so that prompts of one length in words are of one length in tokens.
    """
    chance = Random(number)  # noqa: S311
    chosen: list[str] = [str(number)]
    while len(chosen) < count:
        chosen += chance.sample(WORDS, len(WORDS))
    return " ".join(chosen[:count])


def words_for(tokens: int, count_tokens: Callable[[str], int | None]) -> int:
    """How many words make a prompt of so many tokens, by `count_tokens`, the server's own count, of two short ones.

    LaunchError `no_usage` when the server does not count. At least one word: a chat template may need more than `tokens`.
    """
    short, long = _PROBES
    counts = [count_tokens(words(-number, number)) for number in _PROBES]
    low, high = counts
    if low is None or high is None or high <= low:
        what = "it does not say how many tokens a prompt has (usage.prompt_tokens)"
        raise LaunchError("no_usage", what, "Measure a backend that does")
    each = (high - low) / (long - short)
    return max(1, round(short + (tokens - low) / each))
