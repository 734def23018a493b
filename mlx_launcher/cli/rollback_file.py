"""What a rollback changes in the user's file, and why it changes nothing where it does not."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.backends.models import find_model, require_model
from mlx_launcher.backends.serving import Caller
from mlx_launcher.backends.which import BUILT_IN, which
from mlx_launcher.config import edit
from mlx_launcher.config.layers import Settings
from mlx_launcher.errors import LaunchError

KEY = "serverScript"


class Change(NamedTuple):
    """One key of a file that was read: the whole new text, and the value as it is written there before and after."""

    source: edit.Source
    text: str
    key: str
    before: str | None
    after: str | None

    @property
    def plan(self) -> list[str]:
        return [
            f"In {self.source.file} {self.key} changes from {self.before or 'nothing'} to {self.after or 'nothing'}."
        ]

    @property
    def done(self) -> list[str]:
        return [f"{self.source.file}: {self.key} was {self.before or 'not there'} and is {self.after or 'taken out'}."]


class Unchanged(NamedTuple):
    """Why no file is changed, and what the user may do instead; `by_hand` when that is to write the new value there."""

    why: str
    hint: str = ""
    by_hand: bool = False

    @property
    def plan(self) -> list[str]:
        return [self.why]


def is_legacy(settings: Settings, cwd: str) -> bool:
    """Whether the file means the legacy server itself."""
    try:
        return which(settings, cwd).name == "legacy"
    except LaunchError:
        return False


def change(
    settings: Settings, status: dict[str, Any] | None, cwd: str, state_dir: Path, wanted: str | None
) -> Change | Unchanged:
    """What is to be written: `wanted` as serverScript of the configured block, or with None what was there before a rollback.

    `status` is what the running server says: a file that it was not started from stays as it is.
    """
    file, block = settings.document.file, settings.block
    if file is None:
        return Unchanged("No file is changed: there is none.")
    if status is not None and (why := _not_its_file(settings, status, cwd, state_dir)):
        return Unchanged(f"{file} is not changed: {why}.", "Name the server's file with --config")
    if settings["command"] is not None:
        return Unchanged(
            f"{file} is not changed: backends.{block}.command decides there, not {KEY}.", "Change it by hand"
        )
    path = ("backends", block, KEY)
    if file.suffix in (".yaml", ".yml"):
        value = "what it was before" if wanted is None else json.dumps(wanted, ensure_ascii=False)
        by_hand = f"{file} is YAML and is not edited: set {'.'.join(path)} to {value} by hand."
        return Unchanged(by_hand, "Change it by hand", True)
    source = edit.read(file)
    try:
        before = edit.raw_value(source.text, path)
        if wanted is None:
            return _back(settings, source, path, before, cwd)
        after = json.dumps(wanted, ensure_ascii=False)
        if before is not None and json.loads(before) == wanted:
            return Unchanged(f"{file} names {wanted} already.")
        return Change(source, edit.set_value(source.text, path, after), ".".join(path), before, after)
    except LaunchError as error:
        if error.code != "not_located":
            raise
        return Unchanged(f"{file} is not changed: {error.message}.", f"Set {'.'.join(path)} by hand", True)


def _back(
    settings: Settings, source: edit.Source, path: tuple[str, ...], before: str | None, cwd: str
) -> Change | Unchanged:
    """The value that the youngest backup of another one has, and the very bytes of that backup where nothing else differs."""
    if not before or not is_rolled_back(settings, cwd):
        return Unchanged(f"{source.file}: {'.'.join(path)} is not what a rollback writes.")
    for backup in edit.backups(source.file):
        try:
            old = edit.read(backup).text
            after = edit.raw_value(old, path)
            if after == before:
                continue
            if edit.set_value(old, path, before) == source.text:
                text = old
            elif after is None:
                text = edit.remove_value(source.text, path)
            else:
                text = edit.set_value(source.text, path, after)
        except LaunchError:  # a backup that somebody changed
            continue
        return Change(source, text, ".".join(path), before, after)
    hint = f"Set {'.'.join(path)} by hand, or remove it to serve with mlx-textgen"
    return Unchanged(f"No backup beside {source.file} tells what {KEY} was before.", hint)


def is_rolled_back(settings: Settings, cwd: str) -> bool:
    """Whether serverScript names something else than mlx-textgen: the legacy server, or a script to which one rolled back."""
    try:
        return which(settings, cwd).name != "textgen"
    except LaunchError:
        return True


def _not_its_file(settings: Settings, status: dict[str, Any], cwd: str, state_dir: Path) -> str | None:
    """Why the file is not the one that the running server was started from; None where it is, as far as can be told."""
    if settings.block != status["configured_backend"]:
        return f"the server on port {status['port']} is {status['configured_backend']}, and the file means {settings.block}"
    try:
        anything = which(settings, cwd).name not in BUILT_IN
        require_model(settings, cwd, os.environ, anything)
        found = find_model(settings, state_dir, Caller([], cwd, os.environ), anything)
    except LaunchError as error:
        return f"the model that it names is not the one that runs ({error.message})"
    path = found.model["path"] if found else ""
    if path != status["model"]["path"]:
        return f"the server on port {status['port']} runs another model, {status['model']['path']}"
    return None
