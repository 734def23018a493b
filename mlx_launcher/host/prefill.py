"""Runs a prompt through the model, in batches between which a client's leaving is acted on."""

import threading
import time
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_launcher.host.engine import Counters
from mlx_launcher.host.kvfiles import State, is_plain
from mlx_launcher.host.kvstate import snapshot

# Progress is seen, and a client's leaving acted on, once a batch: one that takes longer than this is halved from then on, so
# that a large model on a slow machine is never mistaken for one that hangs (`hangTimeout`, 120 s by default).
SLOW_BATCH_S = 5.0
MIN_BATCH = 32
# mlx-lm's own step, grown to where the machine is fast enough that a client's leaving is still acted on within about a second.
MAX_BATCH = 2048
QUICK_BATCH_S = 0.4
LONG_BATCH_S = 1.0


class Prefilled(NamedTuple):
    """`logits` None: the client left, and the state holds the first `held` tokens."""

    logits: mx.array | None
    held: int
    copy: State | None


class Prefill:
    """Of one model; what it learns of the machine's speed holds for the next prompt too."""

    def __init__(self, model: Any, batch: int) -> None:
        self._model = model
        self._wanted = self._batch = batch

    def run(
        self, token_ids: mx.array, state: State, held: int, cancelled: threading.Event, counters: Counters
    ) -> Prefilled:
        """Runs what the state does not hold yet, in batches; stops between two if the client left."""
        copy: State | None = None
        last = token_ids.shape[1] - 1
        logits = None
        while held <= last:
            if cancelled.is_set():
                return Prefilled(None, held, None)
            if held == last and not is_plain(state):
                # The next turn begins with this prompt, and its last token has to be left to run.
                copy = snapshot(state)
            # The last token is run by itself, so that a prompt from the cache and one from nothing take the same path.
            began = time.monotonic()
            end = min(held + self._batch, last) if held < last else last + 1
            logits = self._model._inference(token_ids[:, held:end], cache=state, mask=None)
            if held < last:
                mx.eval([layer.state for layer in state])
                mx.clear_cache()
                self._adapt(end - held, time.monotonic() - began)
            else:
                mx.async_eval(logits)  # type: ignore[no-untyped-call]
            counters.processed_tokens += end - held
            held = end
        return Prefilled(logits, held, copy)

    def _adapt(self, tokens: int, took_s: float) -> None:
        """Sets the next batch by how long the last one took."""
        if took_s > SLOW_BATCH_S:
            self._batch = max(MIN_BATCH, self._batch // 2)
        elif took_s > LONG_BATCH_S:
            self._batch = min(self._batch, max(self._wanted, self._batch // 2))
        elif took_s < QUICK_BATCH_S and tokens == self._batch < MAX_BATCH:
            self._batch *= 2
