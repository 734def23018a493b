"""Which model is meant, where it lies, and what can be said about it before anything is started."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.backends.serving import Caller
from mlx_launcher.config.layers import Settings
from mlx_launcher.errors import EXIT_CONFIG, LaunchError
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.plan import Model

# What goes on, and of how many bytes it is how far: {"done": bytes, "total": bytes}.
Say = Callable[[str, dict[str, int]], object]


class Found(NamedTuple):
    """A model that lies on this machine. `given` are the names that flags, environment and file have for it."""

    model: Model
    given: list[str]


def demo_directory(state_dir: Path) -> Path:
    return state_dir / "models" / "demo"


def find_model(
    settings: Settings, state_dir: Path, caller: Caller, anything: bool = False, say: Say = lambda *_: None
) -> Found | None:
    """The model in force, downloaded where it is org/name and not here yet; None when nothing names one.

    `anything`: whatever lies at a path will do, as a server of the user's may load other formats than MLX's.
    LaunchError: what `models.resolve` and `models.download` have against the name; where it came from is added.
    """
    names = [settings["model"]] if settings["model"] else []
    if settings.origin("modelPath") == "flag --demo":
        return Found({"id": "demo", "path": os.fspath(demo_directory(state_dir))}, ["demo", *names])
    key = settings.model_key(caller.cwd)
    if key is None:
        return None
    written: str = settings[key]
    path = _here(settings, key, caller.cwd, caller.environment, anything, say)
    if path is None:
        from mlx_launcher.models import download

        path = download.download(written, say)
    by_flag = settings.origin(key) == "flag --model"
    # What the client sends comes first: anyclaude sends the `model` of its file.
    given = [written, *names] if by_flag else [*names, written]
    return Found({"id": given[0], "path": os.fspath(path)}, given)


def require_model(settings: Settings, cwd: str, environment: Mapping[str, str], anything: bool) -> Path | None:
    """Where the model in force is; None where `anything` will do and none is named. Downloads nothing.

    LaunchError when it is not on this machine or not whole.
    """
    key = settings.model_key(cwd)
    if key is None:
        if anything:
            return None
        raise no_model(settings)
    path = _here(settings, key, cwd, environment, anything)
    if path is None:
        raise LaunchError("model_absent", f"{settings[key]} is not on this machine yet", "start downloads it")
    if not anything:
        check_model(path)
    return path


def no_model(settings: Settings) -> LaunchError:
    """Why there is nothing to serve, for a configuration that names no model on disk."""
    where = f"{settings.document.name}: backends.{settings.block}"
    hint = "Set modelPath there to a directory or org/name, or give --model"
    if settings["model"]:
        where += ".model"
        if not settings.from_file("model"):
            where = settings.origin("model")
            hint = f"Set {where.removeprefix('environment ')} to a directory or org/name, or give --model"
        what = f'{where}: "{settings["model"]}" is a name, and no path says which model that is'
        if settings["model"] == "current-model":
            what = f'{where}: "current-model" is whatever LM Studio has loaded: nothing is to be started for it'
    elif settings.block not in (settings.document.data.get("backends") or {}):
        what = f"{settings.document.name} has no backend {settings.block}, and nothing else names a model"
        hint = "Choose one of its backends with --mode, or give --model"
    else:
        what = f"{where}: neither modelPath nor model is set"
    return LaunchError("no_model", what, hint, EXIT_CONFIG)


def _here(
    settings: Settings, key: str, cwd: str, environment: Mapping[str, str], anything: bool, say: Say = lambda *_: None
) -> Path | None:
    """Where the model that a key names lies on this machine; None for a name on the hub that is not here."""
    # Only a model of one's own costs these imports.
    from mlx_launcher.models import places, resolve

    written, base = settings[key], settings.base(key, cwd)
    plain = Path(os.path.normpath(base / places.expand(written, environment)))
    if anything and os.path.exists(plain):  # noqa: PTH110 - answers no where Path.exists raises
        return plain
    try:
        return resolve.find(written, os.fspath(base), environment, lambda text: say(text, {}))
    except LaunchError as error:
        if settings.origin(key) != "flag --model":
            error.message = f"{settings.origin(key)}: {error.message}"
        raise


def check_model(directory: Path) -> None:
    """Raises LaunchError `model_not_found`, or `model_incomplete` that names the file that is missing or torn."""
    if not directory.exists():
        raise LaunchError(
            "model_not_found", f"there is no model at {directory}", "Give a directory that holds an MLX model"
        )
    if not directory.is_dir():
        raise LaunchError(
            "model_not_found", f"{directory} is a file, not a model", "Give the directory that the file lies in"
        )
    try:
        check(directory)
    except BrokenModelError as error:
        raise LaunchError("model_incomplete", error.reason, error.hint.rstrip(".")) from None


def served_names(given: list[str], path: str) -> list[str]:
    """What a model answers to: the given names, its directory's name, mlx-textgen's short form of that, and its path.

    mlx-textgen alone would answer only to the short form, and clients send what stands in their configuration.
    """
    base = Path(path).name
    short = base.lower().replace("_", "-")
    head, _, last = short.rpartition("-")
    if "bit" in last:
        short = head
    return list(dict.fromkeys(name for name in (*given, base, short, path) if name))
