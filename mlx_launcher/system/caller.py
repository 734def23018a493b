"""Whether the program that started us is still there, in all the ways in which it can go.

anyclaude starts a script as a child of `bash -c`, in a group of its own, and reads its output through a socket. It ends the
group with SIGTERM, or exits without a word (after 120 s of waiting), or is killed; then that bash may live on, and the parent
of the script does not change: only the hang-up of its output tells.
"""

import os
import select

# A hang-up is told unasked, but macOS looks at nothing where nothing to read is asked for (rdar://37537852).
_ASKED = select.POLLIN | select.POLLHUP
_GONE = select.POLLHUP | select.POLLERR


class Caller:
    """The process that is our parent now, and the reader of our standard output."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._output = select.poll()
        self._output.register(1, _ASKED)

    def gone(self) -> bool:
        """Whether the parent has changed or nobody can read our output any more. A file or a terminal never hangs up."""
        return os.getppid() != self._parent or any(event & _GONE for _, event in self._output.poll(0))
