"""Small real MLX models, built in about a second from a seed with the standard library alone: one that answers sensibly,
for `--demo`, and random ones of every family, for tests that must notice a corrupt cache.
"""

from mlx_launcher.demo.answering import AFTER_RESULT, GREETING, build_demo
from mlx_launcher.demo.families import FAMILIES, build_random

__all__ = ["AFTER_RESULT", "FAMILIES", "GREETING", "build_demo", "build_random"]
