"""`mlx-launch cache`: the KV cache on disk, of all models."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_launcher.cli.configured import document_in_force
from mlx_launcher.cli.groups import Table
from mlx_launcher.cli.instances import refuse_unreadable
from mlx_launcher.cli.options import json_option
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.screen import WIDTH, columns, duration, fit, size
from mlx_launcher.config import values
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.kvcache.store import default_max_bytes
from mlx_launcher.kvcache.upkeep import Cleaned, Folder, clear, damaged, prune, survey

_COMMANDS = {
    "list": "Show what is kept for each model.",
    "verify": "Read everything that is kept, and name what is damaged.",
    "prune": "Remove what serves nobody, and what is beyond the bound.",
    "clear": "Remove everything that no server uses.",
}


@click.group("cache", cls=Table, table=_COMMANDS, no_args_is_help=False)
@json_option
def command() -> None:
    """Look after the KV cache on disk.

    It is where `cache.dir` of the configuration says, else in the state directory.
    """


@command.command("list")
@json_option
@click.pass_obj
def list_(app: App) -> Result:
    """Show what is kept for each model, the most recently used first."""
    settings = _settings(app)
    root = _root(app, settings)
    found = survey(root)
    limit = _limit(settings, root)
    data = {"dir": str(root), "limit_bytes": limit, "models": [_as_json(folder) for folder in found]}
    if not found:
        return Result(data, [f"Nothing is kept in {clean(str(root))}."])
    total = sum(folder.bytes_ for folder in found)
    return Result(data, [*_table(found), "", f"{size(total)} of {size(limit)} in {clean(str(root))}"])


@command.command("verify")
@json_option
@click.pass_obj
def verify(app: App) -> Result:
    """Read everything that is kept, and name what is damaged.

    Nothing is changed: a server sets aside what it finds torn, and `clear` removes all of it. Exit code 1 if anything is damaged.
    """
    root = _root(app, _settings(app))
    checked, bad = 0, list[tuple[Path, str]]()
    for folder in survey(root):
        checked += folder.files
        bad += damaged(folder.path)
    data = {"dir": str(root), "files": checked, "damaged": [{"path": str(path), "reason": why} for path, why in bad]}
    lines = [f"  {clean(why)}" for _, why in bad] or [f"All {checked:,} files are whole."]
    if not bad:
        return Result(data, lines)
    what = f"{len(bad)} of {checked} files of the KV cache are damaged"
    hint = "Stop the server and remove them with mlx-launch cache clear; they are made again when they are needed"
    return Result(data, lines, LaunchError("cache_damaged", what, hint))


@command.command("prune")
@click.option("--max-bytes", metavar="SIZE", help="Keep at most this, as 10GB. [default: cache.maxBytes]")
@json_option
@click.pass_obj
def prune_(app: App, max_bytes: str | None) -> Result:
    """Remove what serves nobody: torn files, the entries of models that are gone, and what is beyond the bound."""
    settings = _settings(app)
    root, bound = _root(app, settings), _given(max_bytes)
    if bound is None:
        bound = _limit(settings, root)
    return _cleaned(root, _done(lambda: prune(root, bound)))


@command.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def clear_(app: App, yes: bool) -> Result:
    """Remove everything that no server uses."""
    root = _root(app, _settings(app))
    kept = sum(folder.bytes_ + folder.torn_bytes for folder in survey(root) if not folder.in_use)
    if kept and not yes:
        if app.json or not sys.stdin.isatty():
            raise LaunchError("usage", f"{size(kept)} would be removed", "Give --yes to have it done", EXIT_USAGE)
        click.confirm(f"Remove {size(kept)} in {clean(str(root))}?", abort=True)
    return _cleaned(root, _done(lambda: clear(root)))


def _settings(app: App) -> Settings | None:
    """What is in force; None where the file means a mode that keeps no cache here."""
    document = document_in_force(app)
    try:
        return settle(Flags(), os.environ, document)
    except LaunchError as error:
        if error.code == "nothing_to_start":
            return None
        raise


def _root(app: App, settings: Settings | None) -> Path:
    """Where it is kept. LaunchError `cache_failed` where that cannot be looked at, which must not pass for an empty one."""
    given = settings is not None and settings["cache.dir"] is not None
    root = settings.path("cache.dir", "/") if settings and given else app.state_dir / "kvcache"
    if not given and root.is_symlink():
        what = f"{root} is a link, which is not followed in the state directory"
        raise LaunchError("cache_failed", what, "Set cache.dir to where it leads, and remove the link")
    refuse_unreadable(root, "the KV cache in", "cache_failed", "See whose it is, with ls -ld")
    return root


def _limit(settings: Settings | None, root: Path) -> int:
    limit: int | None = settings["cache.maxBytes"] if settings else None
    return default_max_bytes(root) if limit is None else limit


def _given(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return values.typed_size(text)
    except ValueError as reason:
        raise LaunchError("usage", f"--max-bytes: {reason}", "10GB, for example", EXIT_USAGE) from None


def _done(work: Callable[[], Cleaned]) -> Cleaned:
    try:
        return work()
    except OSError as error:
        what = f"the KV cache cannot be cleaned: {error.filename}: {error.strerror}"
        raise LaunchError("cache_failed", what, "See whose it is, with ls -l") from None


def _cleaned(root: Path, cleaned: Cleaned) -> Result:
    data = {"dir": str(root), "removed_bytes": cleaned.bytes_, "in_use": [str(path) for path in cleaned.in_use]}
    lines = [f"Removed {size(cleaned.bytes_)}."]
    if cleaned.in_use:
        lines.append(f"{len(cleaned.in_use)} left alone, in use by a server: mlx-launch stop ends it.")
    return Result(data, lines)


def _as_json(folder: Folder) -> dict[str, Any]:
    return {
        "model": folder.model,
        "model_path": folder.model_path,
        "path": str(folder.path),
        "files": folder.files,
        "bytes": folder.bytes_,
        "torn_bytes": folder.torn_bytes,
        "used_at": folder.used_at,
        "in_use": folder.in_use,
    }


def _table(found: list[Folder]) -> list[str]:
    rows = [("MODEL", "SIZE", "FILES", "LAST USED", "")]
    for folder in found:
        used = "never" if folder.used_at is None else f"{duration(max(0.0, time.time() - folder.used_at))} ago"
        state = ", ".join(["in use"] * folder.in_use + ["torn files"] * bool(folder.torn_bytes))
        rows.append((clean(folder.model or folder.path.name), size(folder.bytes_), f"{folder.files:,}", used, state))
    widths = [max(columns(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for row in rows:
        cells = (fit(row[0], widths[0]), *row[1:])
        padded = [cell + " " * (width - columns(cell)) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines
