"""Readers: the text that a model writes, sorted into content, reasoning and tool calls."""

from typing import Any, Protocol

from mlx_launcher.host.channels import Channels, Piece
from mlx_launcher.host.stops import StopScanner
from mlx_launcher.host.styles import Parsed, Style, Tools

_BETWEEN_CALLS = " \n\t,;[]"


class Reader(Protocol):
    """Takes text as it is decoded and gives it back in pieces.

    While `constrain` is a string, what is written from here on has to be one JSON call that begins with it; `called` is then
    told that it is whole, or `not_a_call` that it cannot be one. `finished`: nothing more is wanted. `in_call`: cut here, a
    call would be torn.
    """

    constrain: str | None
    finished: bool

    @property
    def in_call(self) -> bool: ...

    def feed(self, text: str) -> list[Piece]: ...

    def called(self) -> list[Piece]: ...

    def not_a_call(self) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What is left when the answer has ended in good order, or was cut outside of a call."""


class TextReader:
    """No tools: everything is content."""

    constrain: str | None = None
    finished = False

    @property
    def in_call(self) -> bool:
        return False

    def feed(self, text: str) -> list[Piece]:
        return [("content", text)] if text else []

    def called(self) -> list[Piece]:
        return []

    def not_a_call(self) -> list[Piece]:
        return []

    def finish(self) -> list[Piece]:
        return []


class ChannelReader(TextReader):
    """Harmony."""

    def __init__(self, opened: str, single: bool) -> None:
        self._channels = Channels(opened)
        self._single = single

    @property
    def in_call(self) -> bool:
        return self._channels.in_call

    def feed(self, text: str) -> list[Piece]:
        pieces = self._channels.feed(text)
        first = next((i for i, (kind, _) in enumerate(pieces) if kind == "call"), None)
        if self._single and first is not None:
            self.finished = True
            return pieces[: first + 1]
        return pieces

    def finish(self) -> list[Piece]:
        return self._channels.finish()


class CallReader:
    """A style with markers: text, then calls. Text behind a call ends the answer: OpenAI's form has no place for it."""

    def __init__(self, style: Style, tools: Tools, *, begun: bool, single: bool) -> None:
        self.constrain: str | None = None
        self.finished = False
        self._style = style
        self._tools = tools
        self._single = single
        self._scanner = StopScanner([style.start])
        self._call: str | None = None
        self._calls = 0
        self._silent = True  # nothing but space was written yet
        if begun:
            self._open("")

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text and not self.finished:
            text = self._in_call(text, pieces) if self._call is not None else self._outside(text, pieces)
        return pieces

    def called(self) -> list[Piece]:
        """The constrained call is whole."""
        pieces: list[Piece] = []
        self._close(pieces, "")
        return pieces

    def not_a_call(self) -> list[Piece]:
        """What followed the marker cannot be a call: it was text after all."""
        call, self._call, self.constrain = self._call or "", None, None
        self._silent = False
        return [("content", call if self._style.bare else self._style.start + call)]

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._call is not None:
            # Styles without a closing marker end with the answer; a constrained call was closed when it was whole.
            self._close(pieces, "")
        elif not self._calls and (rest := self._scanner.flush()):
            pieces.append(("content", rest))
        return pieces

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        shown, found, rest = self._scanner.feed(text)
        if found is not None and self._style.bare and not (self._silent and not shown.strip()):
            # An object in the middle of a text is text.
            pieces.append(("content", shown + found))
            return rest
        if self._calls:
            if shown.strip(_BETWEEN_CALLS):
                self.finished = True
                return ""
            if found == self._style.end:
                return rest
        elif shown:
            self._silent = self._silent and not shown.strip()
            pieces.append(("content", shown))
        if found is not None:
            self._open(found if self._style.bare else "")
            if self._style.arguments_key is not None:
                self.constrain = (self._call or "") + rest
                self._call = self.constrain
                return ""
        return rest

    def _in_call(self, text: str, pieces: list[Piece]) -> str:
        if self._style.arguments_key is not None:
            self._call = (self._call or "") + text
            return ""
        shown, found, rest = self._closer.feed(text)
        self._call = (self._call or "") + shown
        if found is not None:
            self._close(pieces, found)
        return rest

    def _open(self, text: str) -> None:
        self._call = text
        self._closer = StopScanner([self._style.end])
        if self._style.arguments_key is not None:
            self.constrain = text

    def _close(self, pieces: list[Piece], end: str) -> None:
        held = self._closer.flush()
        call, self._call, self.constrain = (self._call or "") + held, None, None
        calls = self._parsed(call)
        if calls is None:
            if call.strip():
                pieces.append(("content", self._style.start + call + end))
            return
        pieces.extend(("call", parsed) for parsed in (calls[:1] if self._single else calls))
        self._calls += len(calls)
        self.finished = self._single
        self._scanner = StopScanner([self._style.start, self._style.end])

    def _parsed(self, call: str) -> Parsed | None:
        """The calls in a call's text; None if it is malformed, or of a tool that nobody offered."""
        try:
            calls = self._style.parse(call, self._tools)
        except Exception:
            # The parsers raise whatever a malformed call makes them stumble over.
            return None
        offered = {tool["function"]["name"] for tool in self._tools}
        return calls if calls and all(name in offered for name, _ in calls) else None


def reader_for(style: Style | None, tools: Tools, *, may_call: bool, must_call: bool, single: bool, opened: str) -> Any:
    """The reader for one answer; `opened` is what the prompt has begun of it."""
    if style is None:
        return ChannelReader(opened, single)
    if not may_call:
        return TextReader()
    return CallReader(style, tools, begun=must_call, single=single)
