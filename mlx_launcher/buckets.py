"""The histograms that a host counts and its supervisor adds up: the bounds that both know, and what can be read from them.

Bounds are seconds, each bucket's upper one and part of it; a last bucket holds all that is longer.
"""

from collections.abc import Sequence

# From a follow-up on a small model to a prompt of 100,000 tokens on a laptop.
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
# From 1,000 tokens a second to one in two.
TOKEN_S = (0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 2.0)

# The name of each on the channel, with its bounds.
BOUNDS = {"first_token_cold_s": FIRST_TOKEN_S, "first_token_warm_s": FIRST_TOKEN_S, "token_s": TOKEN_S}
# How an answer may end, as the channel names it. Of the last one no host can tell: it is its supervisor that counts it.
OUTCOMES = ("ok", "client_error", "server_error", "cancelled", "queue_full", "cut")


def median(bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The middle of what was counted, as if each bucket's values lay evenly in it; None where nothing was.

    In the last bucket nothing is known but its lower bound.
    """
    wanted, below = sum(counts) / 2, 0
    if wanted == 0:
        return None
    for index, count in enumerate(counts):
        if count and below + count >= wanted:
            if index == len(bounds):
                break
            lower = bounds[index - 1] if index else 0.0
            # Rounded, the sum can lie beyond the bound by the last digit.
            return min(lower + (bounds[index] - lower) * (wanted - below) / count, bounds[index])
        below += count
    return bounds[-1]
