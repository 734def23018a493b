"""Harmony, gpt-oss's format: text in channels, calls addressed to functions.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`, and for a call
`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>`. OpenAI's library for it downloads its
vocabulary at run time, which a host must not.
"""

import json
import re
from typing import Any

from mlx_launcher.host.stops import StopScanner

CALL_START = "<|channel|>commentary to=functions."
_CALLED = re.compile(r"\bto=functions\.([\w.-]+)")
_MARKERS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>"]
_ANSWER = "final"

Piece = tuple[str, Any]  # ("content", text), ("reasoning", text) or ("call", (name, arguments))


class Channels:
    """Sorts a stream of text into content, reasoning and calls. `opened` is what the prompt has begun already."""

    def __init__(self, opened: str = "") -> None:
        self._scanner = StopScanner(_MARKERS)
        self._header: str | None = None  # the channel's header while it is being read
        self._channel = _ANSWER
        self._function: str | None = None
        self._body = ""
        self.feed(opened)

    @property
    def in_call(self) -> bool:
        return self._function is not None

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            shown, marker, text = self._scanner.feed(text)
            self._take(shown, pieces)
            if marker is None:
                return pieces
            self._meet(marker, pieces)

    def finish(self) -> list[Piece]:
        """What is left when the answer has ended in good order: `<|call|>` and `<|return|>` are tokens that end it."""
        pieces: list[Piece] = []
        self._take(self._scanner.flush(), pieces)
        self._close(pieces)
        return pieces

    def _take(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._header is not None:
            self._header += text
        elif self._function is not None:
            self._body += text
        elif self._channel:
            pieces.append(("content" if self._channel == _ANSWER else "reasoning", text))

    def _meet(self, marker: str, pieces: list[Piece]) -> None:
        if marker == "<|channel|>":
            self._close(pieces)
            self._header = ""
        elif marker == "<|message|>" and self._header is not None:
            called = _CALLED.search(self._header)
            self._function = called[1] if called else None
            self._channel = self._header.split()[0] if self._header.split() else ""
            self._header = None
        elif marker in ("<|end|>", "<|call|>", "<|return|>"):
            self._close(pieces)
            self._channel = ""  # what stands before the next channel ("assistant") is nobody's text
        elif marker == "<|start|>":
            self._channel = ""

    def _close(self, pieces: list[Piece]) -> None:
        if self._function is not None:
            try:
                pieces.append(("call", (self._function, json.loads(self._body or "{}"))))
            except ValueError:
                pieces.append(("content", self._body))
        self._function, self._body = None, ""
