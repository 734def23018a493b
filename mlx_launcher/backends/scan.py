"""Reads a script for what should not be in it: a key, or writing into places that are not its own.

Finds what is written plainly, and nothing that hides: it is there against mistakes, not against an enemy.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_TOKEN = re.compile(r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,})")
# A long hex or base64 value for a name that says what it is; a path or a variable is none.
_ASSIGNED = re.compile(
    r"""(?ix) (?:(?:\b|_|api)key | auth | token | secret | passw(?:or)?d | credentials?) ["']? \s* [:=] \s* ["']? (?:bearer\s+)?
    (?P<value> [a-z0-9+_-][a-z0-9+/_-]{23,} ={0,2}) (?:["'\s;,)]|$)"""
)
_QUOTED_OR_BARE = r"""(?:"([^"]*)"|'([^']*)'|([^\s"';|&()<>]+))"""
_REDIRECTED = re.compile(r"(?:[0-9]|&)?>{1,2}[|]?\s*" + _QUOTED_OR_BARE)
_WRITING = re.compile(
    r"(?:^|[;|&(]|\b(?:then|do|else|exec|sudo)\b)\s*(?:tee|touch|mkdir|rm|cp|mv|ln|install|rsync|dd)\s([^;|&]*)"
)
_HOMES = ("~/", "$HOME/", "${HOME}/")
_DEVICES = ("/dev/null", "/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/fd/")
_WRITING_METHODS = {"write_text", "write_bytes", "mkdir", "touch", "unlink", "rename", "replace", "rmdir", "symlink_to"}
_MODULES = ("os", "shutil", "io", "codecs")
_WRITING_FUNCTIONS = {
    "makedirs",
    "mkdir",
    "remove",
    "unlink",
    "rename",
    "replace",
    "rmtree",
    "copy",
    "copyfile",
    "copytree",
    "move",
}


def secrets(text: str) -> list[str]:
    """Where something that looks like a key stands; never the key itself."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        assigned = _ASSIGNED.search(line)
        if _TOKEN.search(line) or (assigned and _looks_random(assigned["value"])):
            found.append(f"line {number} holds what looks like a key")
    return found


def _looks_random(value: str) -> bool:
    """Digits among letters, or only hex: names of things have few."""
    digits = sum(char.isdigit() for char in value)
    return digits >= 4 and digits * 10 >= len(value)


def shell_writes(text: str, own: Sequence[Path]) -> list[str]:
    """Redirections and the usual commands that write to a path of its own choice outside `own`."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        paths = ["".join(match.groups(default="")) for match in _REDIRECTED.finditer(line)]
        for match in _WRITING.finditer(line):
            paths += ["".join(words) for words in re.findall(_QUOTED_OR_BARE, match[1])]
        found += [f"line {number} writes to {path}" for path in paths if _is_foreign(path, own)]
    return list(dict.fromkeys(found))


def python_writes(tree: ast.Module | None, own: Sequence[Path]) -> list[str]:
    """Calls that open for writing, make or remove a path that stands there as a text, outside `own`."""
    if tree is None:
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(call.lineno, path) for call in calls for path in _written_by(call)]
    return [f"line {line} writes to {path}" for line, path in sorted(named) if _is_foreign(path, own)]


def imports(tree: ast.Module | None) -> set[str]:
    """The modules that a Python script cannot do without, by their first name: those in a `try` may be missing."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree] if tree is not None else []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.Try):
            pending += ast.iter_child_nodes(node)
    return names - sys.stdlib_module_names


def _written_by(call: ast.Call) -> Iterator[str]:
    """The paths that stand there as texts in a call that writes: `open("/x", "w")`, `os.mkdir("/x")`, `Path("/x").mkdir()`."""
    function = call.func
    written: list[ast.expr] = []
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
        if function.attr in _WRITING_METHODS or (function.attr == "open" and _mode(call, 0)):
            written = [function.value]
    else:
        name = _name(function)
        if name in _WRITING_FUNCTIONS or (name == "open" and _mode(call, 1)):
            written = call.args[:2]
    yield from (text for part in written if (text := _text_of(part)) is not None)


def _name(function: ast.expr) -> str:
    """`open` of `open` and of `io.open`; of what some variable's method may be nothing is known."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in _MODULES:
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _mode(call: ast.Call, place: int) -> bool:
    """Whether an `open` is for writing."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[place : place + 1]
    return any(isinstance(node, ast.Constant) and set(str(node.value)) & set("wax+") for node in given[:1])


def _text_of(node: ast.AST | None) -> str | None:
    """The path in `"/x"`, `Path("/x")`, `expanduser("~/x")` and the like."""
    while isinstance(node, ast.Call):
        node = node.args[0] if node.args else node.func.value if isinstance(node.func, ast.Attribute) else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is_foreign(path: str, own: Sequence[Path]) -> bool:
    for home in _HOMES:
        if path.startswith(home):
            path = os.path.join(os.path.expanduser("~"), path[len(home) :])  # noqa: PTH111, PTH118
    if not path.startswith("/") or path.startswith(_DEVICES):
        return False
    inside = Path(os.path.normpath(path))
    return not any(inside.is_relative_to(folder) for folder in own)
