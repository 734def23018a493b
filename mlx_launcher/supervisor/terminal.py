"""What a supervisor in the foreground says to whoever started it, and whether they are still there."""

import contextlib
import os
import select
from collections.abc import Mapping

from mlx_launcher.supervisor.notify import Notify

# The line that anyclaude looks for in a script's output.
STARTED = "Application startup complete"
# anyclaude waits 120 s for a server, then exits without a word to it.
PATIENCE_S = 90.0
LAST_LINES = 15


class Terminal:
    """Lines on stdout where `wanted`; where not, every call does nothing. A caller is told what it waits for, and watched.

    `managed` is what a service manager said of itself (notify.take), None where none started it; `notify` tells that one.
    """

    def __init__(self, wanted: bool, with_caller: bool = False, managed: Mapping[str, str] | None = None) -> None:
        self.wanted = wanted
        self.service = managed is not None
        self.notify = Notify(managed or {})
        self._tty = next((fd for fd in range(3) if wanted and os.isatty(fd)), None)
        self._caller = None
        self._headline = ""
        self._advised = False
        if with_caller:
            from mlx_launcher.system.caller import Caller

            self._caller = Caller()

    def say(self, line: str) -> None:
        # A terminal that was halted (Ctrl-S) or a reader that does not read must not halt the supervisor.
        with contextlib.suppress(OSError):
            if self.wanted and select.select([], [1], [], 0)[1]:
                os.write(1, line.encode("utf-8", "replace") + b"\n")

    def listening(self, where: str) -> None:
        """The port is bound: for a service manager that is all it waits for."""
        self.say(f"listening on {where}")
        self.notify.ready()

    def show(self, headline: str) -> None:
        """The state in one line, said when it is another one than before."""
        if headline == self._headline:
            return
        self._headline = headline
        self.say(headline)
        self.notify.status(headline)
        if self._caller and headline.startswith("ready "):
            self._advised = True
            self.say(f"{STARTED}: {headline.removeprefix('ready ')}")

    def show_log(self, path: str) -> None:
        """The last lines of the server's log, for whoever sees it fail."""
        if not self.wanted:
            return
        with contextlib.suppress(OSError), open(path, "rb", opener=_open_at_once) as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            for line in log.read().decode(errors="replace").splitlines()[-LAST_LINES:]:
                self.say(f"  | {line}")

    def advise(self, starting_for_s: float) -> None:
        """Tells a caller that a start takes longer than it may wait, once."""
        if self._caller and not self._advised and starting_for_s > PATIENCE_S:
            self._advised = True
            self.say(
                "still loading: anyclaude gives up after 120 s. A model this large is better started before, with "
                "mlx-launch start, or as a service"
            )

    def is_gone(self) -> bool:
        """Whether the terminal that we were started from has been closed."""
        return self._tty is not None and not os.isatty(self._tty)

    def caller_is_gone(self) -> bool:
        return self._caller is not None and self._caller.gone()


def _open_at_once(path: str, flags: int) -> int:
    """Where the log is a FIFO, the open would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)
