"""The project's pages as Markdown has them: what links where, and every block of code with what it is."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
# Words that begin a command where a block does not say what it is.
PROGRAMS = {
    *(
        "mlx-launch",
        ".venv/bin/mlx-launch",
        "make",
        "curl",
        "anyclaude",
        "claude",
        "python",
        "python3",
        "pip",
        "pipx",
        "git",
    ),
    *(
        "cd",
        "export",
        "eval",
        "source",
        "mkdir",
        "cp",
        "mv",
        "rm",
        "cat",
        "chmod",
        "diff",
        "launchctl",
        "systemctl",
        "ssh",
    ),
    *("openssl", "loginctl", "journalctl", "plutil", "unset", "ls", "sed", "echo"),
}
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_LINK = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)")
_PICTURE = re.compile(r"!\[[^]]*\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")
_FENCE = re.compile(r"^( *)```(\w*)$")

Kind = Literal["commands", "session", "json", "yaml", "python", "text", "unknown"]
_FENCED: dict[str, Kind] = {
    "sh": "commands",
    "bash": "commands",
    "console": "session",
    "json": "json",
    "yaml": "yaml",
    "python": "python",
    "text": "text",
}


class Block(NamedTuple):
    """One block of code; `line` counts from 1."""

    page: str
    line: int
    kind: Kind
    text: str


class Step(NamedTuple):
    """One command of a block, and the output that the page shows below it, if it shows any."""

    command: str
    shown: list[str]


def pages() -> list[Path]:
    """In the order of a reader: the first ones, then docs/ by name."""
    first = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    return [*(page for page in first if page.exists()), *sorted((ROOT / "docs").glob("*.md"))]


def links(page: Path) -> Iterator[str]:
    """What a page refers to, as it is written: files, pages, sections, addresses."""
    text = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    yield from _LINK.findall(text)
    yield from (found for pair in _PICTURE.findall(text) for found in pair if found)


def sections(page: Path) -> set[str]:
    """The names by which its headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def blocks(page: Path) -> list[Block]:
    """Every fenced and every indented block of a page."""
    name = page.relative_to(ROOT).as_posix()
    lines = page.read_text().splitlines()
    found, number = list[Block](), 0
    while number < len(lines):
        if fence := _FENCE.match(lines[number]):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            body = [line[len(fence[1]) :] for line in lines[number + 1 : end]]
            found.append(Block(name, number + 2, _FENCED.get(fence[2], "unknown"), "\n".join(body)))
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = next(
                (n for n in range(number, len(lines)) if lines[n] and not lines[n].startswith("    ")), len(lines)
            )
            text = "\n".join(_unindented(lines[number:end]))
            # What continues an item of a list is indented as code is.
            if _is_code(lines, number):
                found.append(Block(name, number + 1, _kind(text), text))
            number = end
        else:
            number += 1
    return found


def _unindented(lines: list[str]) -> list[str]:
    width = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[width:] for line in "\n".join(lines).rstrip().splitlines()]


def _is_code(lines: list[str], number: int) -> bool:
    """In a list, code is indented by four more than the item's text."""
    for line in reversed(lines[:number]):
        if line and not line.startswith(" "):
            item = re.match(r"(\d+\.|[-*]) +", line)
            indent = len(lines[number]) - len(lines[number].lstrip())
            return item is None or indent >= len(item[0]) + 4
    return True


def _kind(text: str) -> Kind:
    first = text.split(maxsplit=1)[0]
    if first == "$":
        return "session"
    if first[0] in '{["':
        return "json"
    return "commands" if first.rpartition("/")[2] in PROGRAMS or _ASSIGNMENT.match(first) else "unknown"


def steps(block: Block) -> Iterator[Step]:
    """The commands of a block in order, lines that go on joined."""
    if block.kind == "session":
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            first, *shown = re.sub(r" *\\\n *", " ", part).rstrip().splitlines()
            yield Step(_without_comment(first), shown)
    elif block.kind == "commands":
        for line in re.sub(r" *\\\n *", " ", block.text).splitlines():
            if command := _without_comment(line):
                yield Step(command, [])


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()


def launches(text: str) -> Iterator[list[str]]:
    """The words after each `mlx-launch` in a command line, as far as they are its own."""
    for part in re.split(r"&&|\|\|?|;|\n", text):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quotation that goes on elsewhere
            words = part.split()
        for number, word in enumerate(words):
            if word == "mlx-launch" or word.endswith("/mlx-launch"):
                yield words[number + 1 :]
                break


def inline(page: Path) -> Iterator[str]:
    """What stands between single backticks in the prose of a page."""
    prose = [line for line in page.read_text().splitlines() if not line.startswith("    ")]
    text = re.sub(r"```.*?```", "", "\n".join(prose), flags=re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)
