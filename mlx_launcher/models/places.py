"""Where models lie on this machine: the hub's cache and LM Studio's folders. Looks, never writes."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import NamedTuple

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Place(NamedTuple):
    """One model on disk. `name` is what finds it again: `org/name`, with `@revision` where that is needed."""

    name: str
    path: Path
    source: str  # "hub" or "lmstudio"


def home(environment: Mapping[str, str]) -> Path:
    """The home directory as `environment` says, else as the user's entry does."""
    return Path(environment.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - Path.home raises where there is none


def expand(text: str, environment: Mapping[str, str]) -> str:
    """A path with a leading `~` replaced; `~name` of no user stays as it is."""
    if text == "~" or text.startswith("~/"):
        return f"{home(environment)}{text[1:]}"
    return os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises for a name that is no user's


def hub_cache(environment: Mapping[str, str]) -> Path:
    """The hub's cache, by the rules of huggingface_hub 2.4 (`constants.py`); an empty variable counts as unset."""

    def variable(name: str) -> str | None:
        value = environment.get(name)
        return expand(Template(value).safe_substitute(environment), environment) if value else None

    if cache := variable("HF_HUB_CACHE") or variable("HUGGINGFACE_HUB_CACHE"):
        return Path(cache)
    if hub := variable("HF_HOME"):
        return Path(hub, "hub")
    return Path(variable("XDG_CACHE_HOME") or home(environment) / ".cache", "huggingface", "hub")


def lmstudio_folders(environment: Mapping[str, str]) -> list[Path]:
    """LM Studio's folders, the newer one first."""
    base = home(environment)
    return [base / ".lmstudio" / "models", base / ".cache" / "lm-studio" / "models"]


def repository(cache: Path, name: str) -> Path:
    """Where the hub's cache keeps `org/name`."""
    return cache / f"models--{name.replace('/', '--')}"


def snapshot(cache: Path, name: str, revision: str | None) -> Path | None:
    """The files of `org/name` at a branch, tag or commit (by default `main`), whole or not; None where there are none."""
    folder = repository(cache, name)
    revision = revision or "main"
    commit = revision if _COMMIT.fullmatch(revision) else _read(folder / "refs" / revision)
    if not commit or not _COMMIT.fullmatch(commit):
        return None
    path = folder / "snapshots" / commit
    return path if os.path.isdir(path) else None  # noqa: PTH112 - answers no where it may not look


def installed(environment: Mapping[str, str]) -> list[Place]:
    """Every model of the hub's cache and of LM Studio's folders, whole or not, by name."""
    places = list(_of_hub(hub_cache(environment)))
    for folder in lmstudio_folders(environment):
        for organisation in _directories(folder):
            places += (
                Place(f"{organisation.name}/{path.name}", path, "lmstudio") for path in _directories(organisation)
            )
    return sorted(places, key=lambda place: (place.name.lower(), place.source))


def _of_hub(cache: Path) -> Iterator[Place]:
    for folder in _directories(cache):
        kind, _, rest = folder.name.partition("--")
        if kind != "models" or "--" not in rest:
            continue
        name = rest.replace("--", "/", 1)
        if main := snapshot(cache, name, None):
            yield Place(name, main, "hub")
        else:
            for path in _directories(folder / "snapshots"):
                yield Place(f"{name}@{path.name}", path, "hub")


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None
