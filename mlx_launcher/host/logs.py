"""The host's log: lines on stderr that never wait for whoever reads them."""

import logging
import select


class _DroppingHandler(logging.Handler):
    """Writes a line if the pipe takes one now, and drops it if not: a stopped supervisor must not stop the server.

    A pipe that polls as writable takes PIPE_BUF bytes (4096 on Linux, 512 on macOS) at once, so lines are cut to that.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._file = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for the life of the process
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).replace("\n", "\n    ").encode(errors="backslashreplace")
        try:
            for start in range(0, len(line) + 1, select.PIPE_BUF):
                if not self._poll.poll(0):
                    return
                piece = line[start : start + select.PIPE_BUF]
                self._file.write(
                    piece if start + select.PIPE_BUF <= len(line) else piece[: select.PIPE_BUF - 1] + b"\n"
                )
        except OSError:
            return


def log_without_blocking(descriptor: int) -> None:
    """Sends what this package logs, and warnings of others, to `descriptor`."""
    handler = _DroppingHandler(descriptor)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mlx_launcher").setLevel(logging.INFO)
