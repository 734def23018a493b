"""Weights that were loaded lazily, read with progress."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def read_weights(model: Any, total: int, progress: Callable[[int, int], object]) -> None:
    """Evaluates the weights array by array: all at once would show the whole size at once."""
    done = 0
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
        done += array.nbytes
        progress(min(done, total), total)
    progress(total, total)
