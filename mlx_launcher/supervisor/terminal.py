"""What a supervisor in the foreground says to whoever started it."""

import contextlib
import os
import select


class Terminal:
    """Lines on stdout where `wanted`; where not, every call does nothing."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._tty = next((fd for fd in range(3) if wanted and os.isatty(fd)), None)
        self._headline = ""

    def say(self, line: str) -> None:
        # A terminal that was halted (Ctrl-S) or a reader that does not read must not halt the supervisor.
        with contextlib.suppress(OSError):
            if self.wanted and select.select([], [1], [], 0)[1]:
                os.write(1, line.encode() + b"\n")

    def show(self, headline: str) -> None:
        """The state in one line, said when it is another one than before."""
        if headline != self._headline:
            self._headline = headline
            self.say(headline)

    def is_gone(self) -> bool:
        """Whether the terminal that we were started from has been closed."""
        return self._tty is not None and not os.isatty(self._tty)
