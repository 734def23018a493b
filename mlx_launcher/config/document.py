"""The configuration file: where it is, and what is written in it."""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.config.problems import Problem, error, invalid, shown, warning

FILE_VARIABLE = "MLX_LAUNCH_CONFIG"
NAMES = (".anyclauderc.json", ".anyclauderc.yaml", ".anyclauderc.yml")
COMMENT = "//"
# The largest that anyclaude ever had is 8 KiB. YAML takes about 5 seconds a MiB, and a start must not wait for it.
MAX_BYTES = 128 * 1024
# YAML's aliases make much of little text: a few lines can mean billions of values, or one that contains itself.
_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_MAX_PROBLEMS = 100
_IS_IT = "Is this the right file?"


class Document(NamedTuple):
    """What a file holds, comments taken out. Without a file: `file` is None and `data` is empty.

    `base` is the directory that relative paths in it start from.
    """

    file: Path | None
    base: Path
    data: dict[str, Any]
    problems: list[Problem]

    @property
    def name(self) -> str:
        return str(self.file) if self.file else "the configuration"


def nothing(cwd: str) -> Document:
    return Document(None, Path(cwd), {}, [])


def find(given: str | None, environment: Mapping[str, str], cwd: str, home: Path | None) -> Path | None:
    """The file in force, absolute: the flag's, else the environment's, else the first one here, else at home.

    The first two are taken as they are, whether they exist or not; None when nobody names one and there is none.
    """
    chosen = given or environment.get(FILE_VARIABLE)
    if chosen:
        # Not Path.expanduser, which raises for a name that begins with ~ and is no user's.
        return Path(os.path.normpath(Path(cwd, os.path.expanduser(chosen))))  # noqa: PTH111
    directories = [Path(cwd), *([home] if home else [])]
    # lexists: a link to nowhere is a mistake to be told, not to be passed over.
    return next((path for path in candidates(directories) if os.path.lexists(path)), None)


def candidates(directories: Iterable[Path]) -> list[Path]:
    return [directory / name for directory in directories for name in NAMES]


def home_directory() -> Path | None:
    """Absolute; None where there is none."""
    try:
        return Path.home().absolute()
    except (RuntimeError, OSError):
        return None


def read(file: Path) -> Document:
    """What the file holds. LaunchError `config_invalid` when that cannot be told: it names the line or the reason."""
    text = _text(file)
    problems: list[Problem] = []
    try:
        parse = _parse_yaml if file.suffix in (".yaml", ".yml") else _parse_json
        data = _clean(parse(text, problems.append), problems)
    except _UnreadableError as reason:
        raise _refused(file, str(reason), reason.hint) from None
    if data is None and file.suffix != ".json":  # an empty YAML file
        data = {}
    if not isinstance(data, dict):
        raise _refused(file, f"an object is wanted, not {kind_of(data)}", 'Begin with { "backends": { … } }')
    return Document(file, file.parent, data, problems)


class _UnreadableError(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def _refused(file: Path, reason: str, hint: str) -> Exception:
    return invalid(str(file), error((), reason, hint))


def _text(file: Path) -> str:
    try:
        # O_NONBLOCK: a pipe that nobody writes to would be waited for without end.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                raw = opened.read(MAX_BYTES + 1)
            else:
                what = "a directory" if stat.S_ISDIR(mode) else "no regular file"
                raise _refused(file, f"this is {what}", "Name a file with --config")
            size = os.fstat(descriptor).st_size
    except FileNotFoundError:
        if file.is_symlink():
            what = f"it is a link to {os.readlink(file)}, which is not there"  # noqa: PTH115
            raise _refused(file, what, "Make it lead to a configuration, or remove it") from None
        hint = "Name another one with --config, or write one with mlx-launch config init"
        raise _refused(file, "there is no such file", hint) from None
    except IsADirectoryError:
        raise _refused(file, "this is a directory", "Name a file with --config") from None
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise _refused(file, f"it cannot be read: {reason}", "Make it readable, or name another one") from None
    if len(raw) > MAX_BYTES:
        what = f"it is {max(size, len(raw))} bytes long, and a configuration has at most {MAX_BYTES}"
        raise _refused(file, what, _IS_IT)
    if raw.startswith(b"\xef\xbb\xbf"):
        hint = "Save it as UTF-8 without one"
        raise _refused(file, "it begins with a byte order mark, which anyclaude cannot read", hint)
    try:
        return raw.decode()
    except UnicodeDecodeError as failure:
        line = raw[: failure.start].count(b"\n") + 1
        raise _refused(file, f"line {line} is not UTF-8", "Save it as UTF-8") from None


Note = Callable[[Problem], None]


def _parse_json(text: str, note: Note) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(found)
        if len(result) < len(found):
            seen: set[str] = set()
            for key, _ in found:
                if key in seen and not key.startswith(COMMENT):
                    note(warning((key,), "this key is there twice, and the last one counts", "Remove one of them"))
                seen.add(key)
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as failure:
        hint = "JSON has no trailing commas and no comments but keys that begin with //"
        raise _UnreadableError(f"line {failure.lineno}, column {failure.colno}: {failure.msg}", hint) from None
    except ValueError as failure:
        raise _UnreadableError(str(failure).partition(";")[0], "Write a smaller number") from None
    except RecursionError:
        raise _UnreadableError("it is nested too deep", _IS_IT) from None


def _parse_yaml(text: str, note: Note) -> Any:
    import yaml

    loader_type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = None
    try:
        _refuse_deep(yaml.parse(text, Loader=loader_type))
        loader = loader_type(text)
        node = loader.get_single_node()
        _note_duplicates(node, note)
        return loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(failure, "problem", None) or " ".join(str(failure).split())
        raise _UnreadableError(f"{where}{what}", "Is this YAML?") from None
    except RecursionError:
        raise _UnreadableError("it is nested too deep", _IS_IT) from None
    except (ValueError, TypeError, LookupError, OverflowError) as failure:
        # Dates that do not exist, keys that cannot be keys.
        raise _UnreadableError(f"a value cannot be read: {failure}", "Put it in quotes") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_deep(events: Iterable[Any]) -> None:
    """Composing is recursive in C: what is nested some 10,000 deep ends the process with SIGSEGV. Reading events is not."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise _UnreadableError(f"line {line}: it is nested too deep", _IS_IT)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _note_duplicates(root: Any, note: Note) -> None:
    import yaml

    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in sorted({name for name in names if names.count(name) > 1} if len(names) < 1000 else ()):
                line = node.start_mark.line + 1
                what = f"this key is there twice in the block at line {line}, and the last one counts"
                note(warning((name,), what, "Remove one of them"))
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _clean(data: Any, problems: list[Problem]) -> Any:
    """Plain JSON without comments. Texts that no program can be given (NUL, half of a character) become problems."""
    left = _MAX_VALUES

    def clean(value: Any, path: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or len(path) > _MAX_DEPTH:
            raise _UnreadableError("it holds too many values, or too deep ones", _IS_IT)
        if isinstance(value, dict):
            return {
                name: clean(part, (*path, name))
                for key, part in value.items()
                if not (name := _key(key, path, problems)).startswith(COMMENT)
            }
        if isinstance(value, list | tuple | set):
            return [clean(part, (*path, str(number))) for number, part in enumerate(value)]
        if isinstance(value, str):
            _check_text(value, path, problems)
            return value
        return value if value is None or isinstance(value, bool | int | float) else str(value)

    cleaned = clean(data, ())
    del problems[_MAX_PROBLEMS:]
    return cleaned


def _key(key: Any, path: tuple[str, ...], problems: list[Problem]) -> str:
    if isinstance(key, str):
        _check_text(key, path, problems)
        return key
    problems.append(warning(path, f"a key is a text, and {shown(str(key))} is {kind_of(key)}", "Put it in quotes"))
    return str(key)


def _check_text(text: str, path: tuple[str, ...], problems: list[Problem]) -> None:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        problems.append(error(path, "this text holds a character that no program can be given", "Remove it"))


def kind_of(value: object) -> str:
    """What a value is, in words: "a text", "a number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
