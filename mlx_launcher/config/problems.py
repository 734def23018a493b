"""What is wrong with a configuration: each problem with its place and its remedy."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mlx_launcher.errors import EXIT_CONFIG, LaunchError

_PLAIN = re.compile(r"[\w./ -]{1,60}")
_SHOWN = 60


class Problem(NamedTuple):
    """One thing that is wrong. `path` leads to it from the top of the file; () is the file itself."""

    severity: Literal["error", "warning"]
    path: tuple[str, ...]
    message: str
    hint: str = ""

    @property
    def key(self) -> str:
        """`backends.mlx.cache.cache_slots`; "" for the file itself."""
        return ".".join(shown(part) for part in self.path)

    @property
    def place(self) -> str:
        """What goes before the message: the key and a colon; "" for the file itself."""
        return f"{self.key}: " if self.path else ""

    @property
    def line(self) -> str:
        """Place, what is wrong and the remedy, for a person."""
        text = f"{self.place}{self.message}"
        return f"{text}. {self.hint}" if self.hint else text

    def as_json(self, file: Path | None) -> dict[str, str | None]:
        return {
            "severity": self.severity,
            "file": str(file) if file else None,
            "path": self.key,
            "message": self.message,
            "hint": self.hint,
        }


def error(path: tuple[str, ...], message: str, hint: str = "") -> Problem:
    return Problem("error", path, message, hint)


def warning(path: tuple[str, ...], message: str, hint: str = "") -> Problem:
    return Problem("warning", path, message, hint)


def shown(text: str) -> str:
    """A name out of a file, short, and quoted where it is not plain."""
    if len(text) > _SHOWN:
        text = text[: _SHOWN - 3] + "..."
    return text if _PLAIN.fullmatch(text) else ascii(text)


def invalid(where: str, problem: Problem, others: int = 0) -> LaunchError:
    """The error (exit 4) for a configuration that cannot be used; `others` counts what else is wrong with it."""
    more = f" (and {others} more, see mlx-launch config validate)" if others else ""
    return LaunchError("config_invalid", f"{where}: {problem.place}{problem.message}{more}", problem.hint, EXIT_CONFIG)


def refuse_errors(where: str, problems: Sequence[Problem]) -> None:
    """LaunchError `config_invalid` for the first error among the problems, if there is one."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise invalid(where, errors[0], len(errors) - 1)
