"""What is looked at before a rollback: the script that is to take over, what it needs, the configuration and the model.

Changes nothing. Bash and the target's own interpreter are asked, because nobody else knows what they can read and import.
"""

import ast
import base64
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.backends import scan
from mlx_launcher.backends.models import check_model, require_model
from mlx_launcher.backends.review import review
from mlx_launcher.backends.which import Kind, which
from mlx_launcher.config import first, modes
from mlx_launcher.config.check import blocks_of
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import Flags, Settings, Value, settle_fallback
from mlx_launcher.errors import EXIT_CONFIG, LaunchError

_LIMIT_S = 10
# What the built-in legacy server is made of.
_LEGACY_IMPORTS = ("mlx_launcher", "mlx", "mlx_lm")
_FIND = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        print(name)
"""


class Target(NamedTuple):
    """What a rollback goes to. `written` is what serverScript gets; `ours` the text of our own script, None for a user's."""

    name: str
    script: Path
    written: str
    ours: str | None
    python: str | None  # the interpreter of a Python script


class Check(NamedTuple):
    name: str
    ok: bool
    message: str
    hint: str = ""


def find_target(settings: Settings, asked: str | None, cwd: str, state_dir: Path, state_dir_given: bool) -> Target:
    """The script behind a backend's name: our own for the built-in legacy server, else the block's serverScript.

    LaunchError (exit 4) for a backend that serverScript cannot name, or that is none.
    """
    name = fallback_name(settings) if asked is None else modes.find_block(asked, blocks_of(settings.document))
    if name is None:
        what = f"{settings.origin('fallback')} is null, and no other backend is named"
        raise LaunchError("no_target", what, f"Name one with --to, for example {modes.LEGACY[0]}", EXIT_CONFIG)
    if name in modes.NOT_SERVED:
        raise modes.why_not(name)
    if settings.origin("fallback") == "default" and name == fallback_name(settings):
        # Its block may name a script or a command; what takes over unasked is the server that borrows the socket.
        return _built_in(name, state_dir, state_dir_given)
    wanted = Settings(settings.asked, settings.block, settings.document, dict(settings.values))
    wanted.values["fallback"] = Value(name, "flag --to")
    own = settle_fallback(wanted)
    written: str = own["serverScript"] or ""
    script = Path(os.path.normpath(own.base("serverScript", cwd) / os.path.expanduser(written)))  # noqa: PTH111
    try:
        kind = which(own, cwd)
    except LaunchError:
        kind = Kind("script", script)  # it is not there, or cannot be read: the checks say so
    if kind.name == "legacy":
        return _built_in(name, state_dir, state_dir_given)
    if kind.name != "script":
        what = f"backend {name} is {'a command' if kind.name == 'command' else 'mlx-textgen'}, not a script to roll back to"
        raise LaunchError(
            "no_target", what, "Name a legacy backend, or one with a serverScript of its own", EXIT_CONFIG
        )
    venv = own.base("pythonVenv", cwd) / os.path.expanduser(own["pythonVenv"])  # noqa: PTH111
    python = None if script.suffix == ".sh" else os.path.normpath(venv / "bin" / "python3")
    return Target(name, script, written, None, python)


def fallback_name(settings: Settings) -> str | None:
    """The name under which the fallback's block is found; None where there is to be no fallback."""
    asked, blocks = settings["fallback"], blocks_of(settings.document)
    if not asked or (settings.origin("fallback") == "default" and sum(name in blocks for name in modes.LEGACY) > 1):
        return asked or None
    return modes.find_block(asked, blocks)


def _built_in(name: str, state_dir: Path, state_dir_given: bool) -> Target:
    ours = first.script_text(state_dir, state_dir_given, first.LEGACY_SCRIPT_NAME)
    path = first.script_path(state_dir, first.LEGACY_SCRIPT_NAME)
    return Target(name, path, os.fspath(path), ours, sys.executable)


def check_target(target: Target, state_dir: Path) -> list[Check]:
    """Every check of the script, those that cannot be made without it left out where it cannot be read."""
    checks, data = _read(target)
    if data is None:
        return checks
    text = data.decode("utf-8", "replace")
    shell = target.script.suffix == ".sh"
    tree, parses = (None, _shell_parses(data)) if shell else _python_parses(text)
    own = [target.script.parent, state_dir, Path("~/.anyclaude").expanduser()]
    secrets = scan.secrets(text)
    writes = scan.shell_writes(text, own) if shell else scan.python_writes(tree, own)
    return [
        *checks,
        parses,
        _unchanged(target, text),
        Check(
            "secrets", not secrets, _listed(secrets, "none found"), "Take it out of the script, into the environment"
        ),
        Check("writes", not writes, _listed(writes, "none found outside its own folders"), "Read that script first"),
        *_interpreter(target, tree),
    ]


def check_around(
    settings: Settings, target: Target, environment: Mapping[str, str], cwd: str, running_model: str | None
) -> list[Check]:
    """The configuration as the rollback would leave it, and the model: the one that is running, else the file's."""
    problems = []
    if settings.document.file:
        document = _afterwards(settings, target)
        found = review(Flags(mode=settings.asked.value), environment, document, cwd)
        problems = [problem for problem in found if problem.severity == "error"]
    wrong = f"{settings.document.name}: {problems[0].key}: {problems[0].message}" if problems else "agrees with itself"
    configuration = Check("configuration", not problems, wrong, problems[0].hint if problems else "")
    anything = target.ours is None  # a script of the user's may load other formats than MLX's
    path = Path(running_model) if running_model is not None else None
    try:
        if path is None:
            path = require_model(settings, cwd, environment, anything)
        elif not anything or not os.path.exists(path):  # noqa: PTH110 - answers no where Path.exists raises
            check_model(path)
    except LaunchError as error:
        return [configuration, Check("model", False, error.message, error.hint)]
    model = Check("model", True, "there" if anything else "whole and readable")
    if anything or path is None or not _is_cluster(settings, cwd):
        return [configuration, model]
    return [configuration, model, _memory(path)]


def _is_cluster(settings: Settings, cwd: str) -> bool:
    try:
        return which(settings, cwd).name == "cluster"
    except LaunchError:
        return False


def _memory(path: Path) -> Check:
    """Whether this machine alone can hold what several held until now."""
    from mlx_launcher.models import fit

    try:
        fit.check(path, force=False)
    except LaunchError as error:
        return Check("memory", False, error.message, "Stay with the cluster, or choose a smaller model")
    return Check("memory", True, "the model fits into this machine alone")


def _afterwards(settings: Settings, target: Target) -> Document:
    blocks = blocks_of(settings.document)
    block = blocks.get(settings.block)
    if not isinstance(block, dict):
        return settings.document
    changed = {**blocks, settings.block: {**block, "serverScript": target.written}}
    return settings.document._replace(data={**settings.document.data, "backends": changed})


def _listed(found: list[str], none: str) -> str:
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "") if found else none


def _read(target: Target) -> tuple[list[Check], bytes | None]:
    """Present, regular, readable and executable; and what it holds. Ours may still have to be installed."""
    script = target.script
    try:
        mode = script.stat().st_mode
    except FileNotFoundError:
        if target.ours is not None and not os.path.lexists(script):
            return [
                Check("script", True, f"{script} is not there yet, and is installed by the rollback")
            ], target.ours.encode()
        return [
            Check("script", False, f"there is no script {script}", "Correct the path, or put the script there")
        ], None
    except OSError as error:
        return [Check("script", False, f"{script} cannot be looked at: {error.strerror}", "Make it readable")], None
    if not stat.S_ISREG(mode):
        return [Check("script", False, f"{script} is no regular file", "Name a script")], None
    there = Check("script", True, f"{script}")
    try:
        data = script.read_bytes()
    except OSError as error:
        return [there, Check("permissions", False, f"it cannot be read: {error.strerror}", f"chmod +r {script}")], None
    runs = os.access(script, os.X_OK)
    what = "readable and executable" if runs else f"{script} is not executable"
    return [there, Check("permissions", runs, what, "" if runs else f"chmod +x {script}")], data


def _shell_parses(data: bytes) -> Check:
    bash = shutil.which("bash")
    if bash is None:
        return Check("syntax", False, "there is no bash to ask", "Install bash")
    done = _run([bash, "-n"], data)
    said = done.strip().splitlines()
    return Check("syntax", not said, said[0] if said else "it parses", "Correct the script")


def _python_parses(text: str) -> tuple[ast.Module | None, Check]:
    try:
        return ast.parse(text), Check("syntax", True, "it parses")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        return None, Check("syntax", False, f"it does not parse: {line}", "Correct the script")


def _unchanged(target: Target, text: str) -> Check:
    if target.ours is None:
        return Check("unchanged", True, "a script of your own: there is nothing to compare it with")
    if text != target.ours:
        what = f"{target.script} is not what this version installs: it was changed, or is an older one"
        return Check("unchanged", False, what, f"Move {target.script} away: the rollback installs it anew")
    if not _as_recorded():
        return Check("unchanged", False, "the installed package was changed", "Install mlx-launcher again")
    return Check("unchanged", True, "as it was installed")


def _as_recorded() -> bool:
    """Whether the package's own copy is the one of which its installation recorded the hash; a checkout has none."""
    from importlib import metadata

    try:
        files = metadata.distribution("mlx-launcher").files or []
    except metadata.PackageNotFoundError:
        return True
    for file in files:
        if file.name == first.LEGACY_SCRIPT_NAME and file.parent.name == "scripts" and file.hash is not None:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
    return True


def _interpreter(target: Target, tree: ast.Module | None) -> list[Check]:
    """Whether what the script runs in is there, and finds what the script imports."""
    if target.python is None:
        bash = shutil.which("bash")
        return [Check("interpreter", bash is not None, bash or "there is no bash", "" if bash else "Install bash")]
    if not os.access(target.python, os.X_OK) or not Path(target.python).is_file():
        hint = "Set pythonVenv at the top of the file, or make one with python3 -m venv"
        return [Check("interpreter", False, f"there is no Python at {target.python}", hint)]
    there = Check("interpreter", True, target.python)
    names = sorted({*scan.imports(tree), *(_LEGACY_IMPORTS if target.ours is not None else ())})
    code = [target.python, "-P", "-c", _FIND] if target.ours is not None else [target.python, "-c", _FIND]
    missing = _run([*code, os.fspath(target.script.parent), *names]).split()
    if missing:
        what = f"{target.python} cannot import {' '.join(missing)[:300]}"
        return [there, Check("imports", False, what, "Install what is missing there")]
    return [there, Check("imports", True, f"{', '.join(names) or 'nothing'} found")]


def _run(argv: list[str], data: bytes = b"") -> str:
    """What a short program says, on either stream; why it could not, where it could not."""
    # Of a locale that is not installed bash complains before it has read a line.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, input=data, capture_output=True, timeout=_LIMIT_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"no answer within {_LIMIT_S} s"
    except OSError as error:
        return error.strerror or str(error)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    return said or (f"it ended with {done.returncode}" if done.returncode else "")
