"""What is kept, as a tree: a segment holds the keys and values of its own tokens and goes on from a prefix of its parent's line.

So a turn of a conversation adds its new tokens and nothing else, and two conversations share what they begin with. Pure.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = array("i").itemsize


@dataclass(eq=False)
class Segment:
    """`start`: how many tokens of the parent's line come before its own. `whole`: it serves only a prompt that goes on from all
    of it, because no shorter state can be had from it (sliding windows, recurrent layers); it has neither parent nor children.
    """

    path: Path
    parent: "Segment | None"
    start: int
    tokens: bytes  # its own, as `pack` makes them: comparing them costs a memcmp
    whole: bool
    used_at: float  # seconds since the epoch
    size: int  # bytes of the file
    children: list["Segment"] = field(default_factory=list)
    verified: bool = False  # its data is known to be what was written

    @property
    def end(self) -> int:
        """In tokens from the beginning of the prompt."""
        return self.start + len(self.tokens) // WIDTH

    def line(self) -> list["Segment"]:
        """From the first segment to this one."""
        line = [self]
        while line[-1].parent is not None:
            line.append(line[-1].parent)
        return line[::-1]


class Tree:
    """All segments of one model; the roots are those that begin a prompt."""

    def __init__(self) -> None:
        self.roots: list[Segment] = []

    def __iter__(self) -> Iterator[Segment]:
        """Every segment, parents before their children."""
        waiting = list(self.roots)
        while waiting:
            segment = waiting.pop()
            yield segment
            waiting += segment.children

    def add(self, segment: Segment) -> None:
        (segment.parent.children if segment.parent else self.roots).append(segment)

    def remove(self, segment: Segment) -> None:
        (segment.parent.children if segment.parent else self.roots).remove(segment)

    def ends(self) -> list[Segment]:
        """The last segments of all lines: a conversation each. What a turn leaves off of the one before, a thought or a reminder,
        is no conversation of its own.
        """
        return [segment for segment in self if not segment.children]

    def longest(self, wanted: bytes) -> tuple[Segment | None, int]:
        """The segment whose line shares most tokens with `wanted` from the start, and how many."""
        best: tuple[Segment | None, int] = None, 0
        waiting = [segment for segment in self.roots if not segment.whole]
        while waiting:
            segment = waiting.pop()
            shared = segment.start + common_prefix(segment.tokens, wanted, segment.start)
            if shared > best[1]:
                best = segment, shared
            waiting += [child for child in segment.children if child.start <= shared]
        return best

    def longest_whole(self, wanted: bytes) -> Segment | None:
        """The longest whole state that `wanted` goes on from, or is."""
        fitting = [segment for segment in self.roots if segment.whole and wanted.startswith(segment.tokens)]
        return max(fitting, key=lambda segment: segment.end, default=None)


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as 32-bit integers."""
    return array("i", tokens).tobytes()


def common_prefix(a: bytes, b: bytes, skip: int = 0) -> int:
    """How many tokens `a` shares with `b` from its token `skip` on, by comparing halves: most of 18k tokens are alike."""
    begin = skip * WIDTH
    low, high = 0, max(0, min(len(a), len(b) - begin)) // WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * WIDTH : middle * WIDTH] == b[begin + low * WIDTH : begin + middle * WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low
