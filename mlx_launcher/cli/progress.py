"""Shows what goes on while somebody waits: one line that moves on a terminal, one line per change elsewhere."""

import os
import shutil
import time
from typing import TextIO

from mlx_launcher.cli.screen import WIDTH, columns, duration, fit, size

_BAR = 20


class Progress:
    """Used as a context, so that the moving line is gone whatever ends the wait."""

    def __init__(self, stream: TextIO, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._moving = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begun = time.monotonic()
        self._said = ""
        self._shown = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def show(self, what: str, bytes_: dict[str, int] | None = None) -> None:
        """What is going on now, and of how many bytes it is how far: `{"done": bytes, "total": bytes}`."""
        if self._quiet:
            return
        if self._moving:
            width = min(WIDTH, shutil.get_terminal_size().columns) - 1
            line = fit(moving_line(what, bytes_, time.monotonic() - self._begun), width)
            self._write("\r" + line + " " * (self._shown - columns(line)))
            self._shown = columns(line)
        elif what != self._said:
            self._write(what + "\n")
        self._said = what

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a full disk below a redirected output is no reason to break off what goes on
            self._quiet = True


def moving_line(what: str, bytes_: dict[str, int] | None, waited_s: float) -> str:
    """`loading  [##########..........]  50 %  1.5 of 3.0 GB  12 s`; without bytes, the first and the last part."""
    if not bytes_ or not bytes_.get("total"):
        return f"{what}  {duration(waited_s)}"
    done, total = bytes_.get("done") or 0, bytes_["total"]
    part = min(1.0, done / total)
    bar = "#" * int(part * _BAR)
    return f"{what}  [{bar:.<{_BAR}}]  {part:.0%}  {size(done)} of {size(total)}  {duration(waited_s)}"
