"""Guided decoding: grammars for llguidance, and the mask that it puts on logits.

llguidance has no compile step to speak of (measured: 8 ms for 16 tools at 151k tokens, where outlines 0.2.3 takes 131 s).
Its own MLX kernel runs on Metal only, so the mask is unpacked with numpy, which works everywhere.
"""

import functools
import json
import threading
from concurrent.futures import Future
from typing import Any

import llguidance.hf
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.requests import Guide, Tool

Grammar = Any  # llguidance's own serialized form


def tool_call_grammar(tools: list[Tool], arguments_key: str = "arguments") -> Grammar:
    """A grammar for one JSON call, `{"name": …, "arguments": …}`, of one of `tools`. Some models write "parameters" there.

    Each tool's schema stays a document of its own, so that its `$ref`s resolve inside it.
    """
    lines = [f"start: {' | '.join(f'call{i}' for i in range(len(tools)))}", r"WS: /[ \n\t]{0,4}/"]
    for i, tool in enumerate(tools):
        name = json.dumps(json.dumps(tool.name))
        head = f'"{{" WS {json.dumps(json.dumps("name"))} WS ":" WS {name} WS "," WS'
        lines.append(f'call{i}: {head} {json.dumps(json.dumps(arguments_key))} WS ":" WS args{i} WS "}}"')
        lines.append(f"args{i}: %json {_arguments_schema(json.dumps(tool.parameters))}")
    return LLMatcher.grammar_from_lark("\n".join(lines))


@functools.lru_cache(maxsize=256)  # a conversation brings the same tools with each of its turns
def _arguments_schema(parameters: str) -> str:
    """What of a tool's schema, as JSON, can be followed: one that asks for more (`uniqueItems`, `propertyNames`, a look-ahead) is
    no reason to answer none of a client's requests. At least an object comes of it.
    """
    schema = json.dumps({**json.loads(parameters), "x-guidance": {"lenient": True}})
    grammar = LLMatcher.grammar_from_lark(f"start: %json {schema}")
    return '{"type": "object"}' if LLMatcher.validate_grammar(grammar) else schema


def guide_grammar(guide: Guide) -> Grammar:
    """The grammar of a request's own guide."""
    if guide.kind == "json":
        return LLMatcher.grammar_from_json_schema(guide.value)
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.value)
    if guide.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in guide.value))
    return LLMatcher.grammar_from_lark(guide.value)


class Guides:
    """Makes matchers for one tokenizer. It is converted on a thread of its own, which takes 1.2 s at 152k tokens
    (benchmarks/guided.py): by the first tool call that is over.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._converting: Future[LLTokenizer] = Future()
        threading.Thread(target=self._convert, args=(tokenizer,), name="guides", daemon=True).start()

    def _convert(self, tokenizer: Any) -> None:
        try:
            self._converting.set_result(llguidance.hf.from_tokenizer(tokenizer))
        except Exception as error:
            self._converting.set_exception(RequestError(400, f"this model's answers cannot be guided: {error}"))

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Raises RequestError 400 for a grammar that cannot be followed."""
        tokenizer = self._converting.result()
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(
                400, f"this schema or grammar cannot be followed: {matcher.get_error()}", code="bad_grammar"
            )
        return Matcher(matcher, tokenizer.vocab_size)


class Matcher:
    """One grammar being followed; put on mlx-textgen's Sampler as its `structured_processor`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._bits = np.empty((vocabulary + 31) // 32, dtype=np.int32)

    def __call__(self, *, input_ids: mx.array, logits: mx.array) -> mx.array:
        """Logits with -inf wherever the grammar does not allow the token."""
        self.fill()
        allowed = np.zeros(logits.shape[-1], dtype=bool)
        unpacked = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: allowed.size]
        allowed[: unpacked.size] = unpacked
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, dtype=logits.dtype))

    def fill(self) -> None:
        """Computes the mask of the present place in the grammar."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def consume(self, tokens: list[int]) -> bool:
        """Advances; False if the grammar does not allow these tokens here (it is then as it was before)."""
        taken = int(self._matcher.try_consume_tokens(tokens))
        if taken < len(tokens):
            self._matcher.rollback(taken)
        return taken == len(tokens)

    @property
    def finished(self) -> bool:
        """Nothing more may follow."""
        return bool(self._matcher.is_stopped())
