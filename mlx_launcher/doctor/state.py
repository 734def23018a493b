"""The directories that everything is kept in: at home, the state's, the KV cache's; and how many files may be open."""

import os
import pwd
import resource
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mlx_launcher.config.layers import Settings
from mlx_launcher.config.paths import loose as open_to_others
from mlx_launcher.config.paths import may_be_closed
from mlx_launcher.doctor.check import Check, Outcome, Subject
from mlx_launcher.doctor.places import is_directory, is_ours, make_writable, nearest, owner, set_aside, writable
from mlx_launcher.errors import LaunchError
from mlx_launcher.kvcache.store import MIN_FREE_BYTES, default_max_bytes
from mlx_launcher.models import fit
from mlx_launcher.models.directory import BrokenModelError
from mlx_launcher.models.facts import facts

_OPEN_FILES = 256  # macOS's own default
_WANTED_FILES = 4096
# What a supervisor makes in an instance's directory, for its user alone; logs are rotated with a number behind them.
_PRIVATE = ("control.sock", "state.json", "lock", "server.log*", "journal.jsonl*", "script.log*")
_OTHERS = 0o077
_ANOTHER = "give another one with --state-dir"


def home(subject: Subject) -> Check:
    """The home directory: the state, the models and the configuration lie there unless they are put elsewhere."""
    variable, path = subject.environment.get("HOME"), _home(subject)
    elsewhere = not subject.state_dir.is_relative_to(path) or writable(subject.state_dir)
    if writable(path):
        return Check("home", "ok", f"{path}{'' if variable else ' (HOME is not set)'}")
    what = f"the home directory {path} {'cannot be written to' if is_directory(path) else 'is not there'}"
    entry = _entry()
    if is_directory(path) and is_ours(path):
        remedy = f"chmod u+rwx {shlex.quote(str(path))}"
    elif entry and Path(entry) != path and writable(Path(entry)):
        remedy = f"export HOME={shlex.quote(entry)}"
    else:
        remedy = 'export MLX_LAUNCH_STATE_DIR="${TMPDIR:-/tmp}/mlx-launch-$(id -u)"'
    return Check("home", "warning" if elsewhere else "failed", what, remedy)


def _home(subject: Subject) -> Path:
    return Path(subject.environment.get("HOME") or _entry() or "/")


def _entry() -> str | None:
    """The home directory as the user's entry has it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def state_directory(subject: Subject) -> Iterator[Check]:
    """The state directory: ours, private, no link; and the same of what lies in it."""
    path, name = subject.state_dir, "state directory"
    quoted = shlex.quote(str(path))
    if not os.path.lexists(path):
        yield _not_there(subject)
    elif path.is_symlink():
        where = shlex.quote(os.path.realpath(path))
        mend = f"rm {quoted} && mv {where} {quoted}" if is_directory(path) else f"rm {quoted}"
        result: Outcome = "warning" if is_directory(path) else "failed"
        yield Check(name, result, f"{path} is a link to {os.path.realpath(path)}", mend)
    elif not path.is_dir():
        yield Check(name, "failed", f"{path} is no directory", set_aside(path))
    elif not is_ours(path):
        take = make_writable(path, _home(subject))
        what = f"{path} belongs to {owner(path)}"
        yield Check(name, "failed", what if take else f"{what}: {_ANOTHER}", take)
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Check(name, "failed", f"{path} cannot be used (mode {_mode(path):04o})", f"chmod 700 {quoted}")
    elif _mode(path) & _OTHERS:
        what, close = f"{path} is open to others (mode {_mode(path):04o})", f"chmod 700 {quoted}"
        if may_be_closed(path):
            yield Check(name, "warning", what, close)
        else:
            public = _mode(path) & stat.S_ISVTX  # as /tmp is
            what += f", and holds more than our state: {_ANOTHER}"
            yield Check(name, "failed", what, None if public else close)
    else:
        yield from _inside(subject)


def _not_there(subject: Subject) -> Check:
    path, above = subject.state_dir, nearest(subject.state_dir)
    if writable(above):
        return Check("state directory", "ok", f"{path} is made at the first start")
    at_home = _home(subject)
    if path.is_relative_to(at_home) and not writable(at_home):
        return Check("state directory", "skipped", f"{path} lies at home, which comes first")
    mend = make_writable(path, at_home) if above.is_dir() else set_aside(above)
    return Check("state directory", "failed", f"{path} cannot be made: {above} cannot be written to", mend)


def _inside(subject: Subject) -> Iterator[Check]:
    loose, links, strange, no_files = open_to_others(subject.state_dir), [], [], []
    for instance in subject.instances:
        found = [path for pattern in _PRIVATE for path in sorted(instance.path.glob(pattern))]
        files = [path for path in found if path.suffix != ".aside"]  # what a remedy below has put there
        for path in [instance.path, *files]:
            if path.is_symlink():
                links.append(path)
            elif not is_ours(path):
                strange.append(path)
            elif path != instance.path and is_directory(path):
                no_files.append(path)
            elif _mode(path) & _OTHERS:
                loose.append(path)
    # One finding for all of a kind: what loosened one of them has often loosened all.
    for paths, what, command in (
        (links, "a link, where a file of ours should be", "rm"),
        (strange, "not ours", 'sudo chown -R "$(id -un)"'),
        (loose, "open to others", "chmod go-rwx"),
    ):
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            mend = f"{command} {shlex.join(map(str, paths))}"
            yield Check("state directory", "warning", f"{paths[0]}{more}: {what}", mend)
    for path in no_files:
        what = f"{path}: a directory, where a file of ours should be"
        yield Check("state directory", "warning", what, set_aside(path))
    if not (loose or links or strange or no_files):
        yield Check("state directory", "ok", f"{subject.state_dir} is ours alone")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def disk(subject: Subject) -> Check:
    """Whether the KV cache can be kept, and has room for a few prompts."""
    settings = subject.settings
    if isinstance(settings, LaunchError):
        return Check("disk", "skipped", "the configuration comes first")
    if not settings["cache.enable_cache"]:
        return Check("disk", "skipped", "the KV cache is switched off (cache.enable_cache)")
    path = cache_directory(subject, settings)
    above = nearest(path)
    if path.is_relative_to(subject.state_dir) and not writable(subject.state_dir):
        if is_directory(subject.state_dir) or not writable(above):
            return Check("disk", "skipped", "the state directory comes first")
        return _room(subject, settings, path, above)  # whether that can be made is the state directory's own question
    if not above.is_dir():
        return Check("disk", "warning", f"{above} is no directory: the KV cache is not kept", set_aside(above))
    if not writable(above):
        whose = "" if is_ours(above) else f", which belongs to {owner(above)},"
        what = f"{above}{whose} cannot be written to: the KV cache is not kept"
        return Check("disk", "warning", what, make_writable(path, _home(subject)) or subject.edit())
    return _room(subject, settings, path, above)


def cache_directory(subject: Subject, settings: Settings) -> Path:
    return subject.state_dir / "kvcache" if settings["cache.dir"] is None else settings.path("cache.dir", "/")


def _room(subject: Subject, settings: Settings, path: Path, above: Path) -> Check:
    free, prompt = shutil.disk_usage(above).free, _prompt_bytes(subject)
    given: int | None = settings["cache.maxBytes"]
    limit = default_max_bytes(path) if given is None else given
    what = f"{path}: {free / 1e9:.1f} GB free, {limit / 1e9:.1f} GB for the KV cache"
    what += f", {prompt / 1e9:.2f} GB for a prompt of {fit.PROMPT_TOKENS:,} tokens" if prompt else ""
    if given is not None and given < prompt:
        return Check("disk", "warning", f"{what}: none is kept", subject.edit())
    if min(limit, free - MIN_FREE_BYTES) < prompt:
        return Check("disk", "warning", f"{what}: too little to keep one", f"{subject.plain('cache')} clear")
    return Check("disk", "ok", what)


def _prompt_bytes(subject: Subject) -> int:
    """0 where that is not known."""
    if isinstance(subject.found, LaunchError):
        return 0
    try:
        model = facts(Path(subject.found.model["path"]))
    except (BrokenModelError, OSError):
        return 0
    return (model.kv_bytes_per_token or 0) * fit.PROMPT_TOKENS


def open_files() -> Check:
    """How many files, connections among them, a server started from here may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED_FILES if hard < 0 else min(hard, _WANTED_FILES)
    if 0 <= soft < _OPEN_FILES:
        what = f"a process may have {soft} files open: many clients at once are more"
        return Check("open files", "warning", what, f"ulimit -S -n {most}" if most > soft else None)
    return Check("open files", "ok", f"{'no limit' if soft < 0 else f'{soft:,}'} to a process")
