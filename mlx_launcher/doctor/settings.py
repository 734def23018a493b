"""The configuration, the scripts that it names, and whether a start could be made of it all."""

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_launcher.backends.assemble import assemble
from mlx_launcher.backends.checks import Check as ScriptCheck
from mlx_launcher.backends.checks import Target, check_target
from mlx_launcher.backends.which import NAMES, Kind, which
from mlx_launcher.config import first
from mlx_launcher.config.check import check_all
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import API_KEY_VARIABLE, Settings, settle_fallback
from mlx_launcher.doctor.check import EDITOR, Check, Outcome, Subject, sentence
from mlx_launcher.doctor.places import is_file, is_ours, nearest, writable
from mlx_launcher.errors import LaunchError

# What another check has told already, where a start would tell it again.
_TOLD = ("model_", "no_model", "architecture_", "no_venv")
# anyclaude reads no other file, and runs the script only through the virtual environment.
_ANYCLAUDES = ".anyclauderc.json"
_BUILT_IN = {"textgen": "mlx-textgen", "legacy": "mlx-lm's own server", "cluster": "several machines as one"}


def configuration(subject: Subject) -> Iterator[Check]:
    """Every problem of the file, used or not, and of the environment's variables."""
    document = subject.document
    if isinstance(document, LaunchError):
        yield Check("configuration", "failed", sentence(document), _make_readable(subject))
        return
    problems = check_all(document)
    for problem in problems:
        result: Outcome = "failed" if problem.severity == "error" else "warning"
        yield Check("configuration", result, f"{document.name}: {problem.line}", subject.edit())
    settled = subject.settings
    if isinstance(settled, LaunchError) and settled.code == "nothing_to_start":
        yield Check("configuration", "ok", sentence(settled))
    elif isinstance(settled, LaunchError) and not any(problem.message in settled.message for problem in problems):
        word, _, rest = settled.message.partition(" ")
        mend = f"unset {rest.partition(':')[0]}" if word == "environment" else subject.edit()
        yield Check("configuration", "failed", sentence(settled), mend)
    elif not problems:
        yield Check("configuration", "ok", _nothing_wrong(document))


def _make_readable(subject: Subject) -> str | None:
    """What helps with a file that cannot be read, for whatever reason."""
    file = subject.file
    if file is None:
        return None
    above = nearest(file)
    if above != file:
        if not writable(above):
            return f"chmod u+rwx {_quoted(above)}" if is_ours(above) else None
        make = f"mkdir -p {_quoted(file.parent)} && " if above != file.parent else ""
        return f"{make}{subject.plain('config')} init {_quoted(file)}"
    if file.is_file() and is_ours(file) and not os.access(file, os.R_OK):
        return f"chmod u+r {_quoted(file)}"
    return subject.edit()


def _nothing_wrong(document: Document) -> str:
    return f"{document.file}: nothing is wrong" if document.file else "no file: flags, environment and defaults hold"


def scripts(subject: Subject) -> Iterator[Check]:
    """The serverScript of the backend and of a fallback that was named, and what anyclaude needs to run it."""
    settings = subject.settings
    if isinstance(settings, LaunchError):
        yield Check("scripts", "skipped", "the configuration comes first")
        return
    found = list(_of_block(subject, settings, subject.kind))
    if settings["fallback"] and settings.origin("fallback") != "default":
        found += list(_of_fallback(subject, settings))
    found += list(_for_anyclaude(subject, settings)) if not found else []
    yield from found or [Check("scripts", "ok", _in_order(settings))]


def _of_fallback(subject: Subject, settings: Settings) -> Iterator[Check]:
    try:
        own = settle_fallback(settings)
    except LaunchError:  # its block is wrong, which is a problem of the configuration
        return
    try:
        kind: Kind | LaunchError = which(own, subject.cwd)
    except LaunchError as error:
        kind = error
    yield from _of_block(subject, own, kind)


def _in_order(settings: Settings) -> str:
    if not settings["serverScript"]:
        return "none is named"
    if settings["command"] is not None:
        return "none is used, as command decides"
    return f"{settings['serverScript']} can be run"


def _of_block(subject: Subject, settings: Settings, kind: Kind | LaunchError) -> Iterator[Check]:
    """What is wrong with the script that a block is served by."""
    if isinstance(kind, LaunchError):
        file = settings.path("serverScript", subject.cwd)
        mend = f"chmod u+r {_quoted(file)}" if is_file(file) and is_ours(file) else subject.edit()
        yield Check("scripts", "failed", sentence(kind), mend)
        return
    if kind.script is None:
        return
    venv = settings.path("pythonVenv", subject.cwd)
    shell = kind.script.suffix == ".sh"
    if not shell and not is_file(venv / "bin" / "activate"):
        what = f"{kind.script} runs in the virtual environment {venv}, and there is no bin/activate in it"
        yield Check("scripts", "failed", what, f"python3 -m venv {_quoted(venv)}")
        return
    python = None if shell else os.fspath(venv / "bin" / "python3")
    target = Target(settings.block, kind.script, settings["serverScript"], None, python)
    for check in check_target(target, subject.state_dir):
        if not check.ok:
            yield _script_finding(subject, kind.script, check)


def _script_finding(subject: Subject, script: Path, check: ScriptCheck) -> Check:
    found = f"{script}: {check.message}" if str(script) not in check.message else check.message
    if check.name == "permissions":
        # The launcher and anyclaude name the shell or the interpreter; a rollback refuses it.
        result: Outcome = "warning" if os.access(script, os.R_OK) else "failed"
        return Check("scripts", result, found, check.hint)
    # A script may say what it likes; what it imports may be found by means of its own.
    result = "failed" if check.name in ("script", "syntax", "interpreter") else "warning"
    return Check("scripts", result, f"{found}. {check.hint}", f"{EDITOR} {_quoted(script)}")


def _for_anyclaude(subject: Subject, settings: Settings) -> Iterator[Check]:
    """What this launcher does without and anyclaude does not."""
    if not settings.from_file("serverScript") or subject.file is None or subject.file.name != _ANYCLAUDES:
        return
    script = settings.path("serverScript", subject.cwd)
    if not os.path.exists(script):  # noqa: PTH110
        what = f"there is no {script}: mlx-launch does without it, but anyclaude does not"
        yield Check("scripts", "warning", what, _install(subject, script) or subject.edit())
    elif not (stat.S_IMODE(script.stat().st_mode) & stat.S_IXUSR):
        yield Check("scripts", "warning", f"{script} is not executable", f"chmod +x {_quoted(script)}")
    venv = settings.path("pythonVenv", subject.cwd)
    if not is_file(venv / "bin" / "activate"):
        what = f"anyclaude runs the script through {venv}/bin/activate, which is not there"
        yield Check("scripts", "warning", f"{what} (pythonVenv)", f"python3 -m venv {_quoted(venv)}")


def _install(subject: Subject, script: Path) -> str | None:
    """A command that puts our script where `config init` put it; None where it was somewhere else, or is none of ours."""
    try:
        if script.name not in NAMES or first.script_path(subject.state_dir, script.name) != script:
            return None
    except LaunchError:
        return None
    given = subject.state_dir / "bin" != Path("~/.anyclaude/mlx-launch/bin").expanduser()
    code = "from pathlib import Path; from mlx_launcher.config import first; first.install_script"
    code += f"(Path({os.fspath(subject.state_dir)!r}), {given}, {script.name!r})"
    return f"{_quoted(sys.executable)} -c {_quoted(code)}"


def start(subject: Subject) -> Check:
    """Whether a plan can be made: what is left when the configuration, the scripts and the model are right by themselves."""
    settings, found = subject.settings, subject.found
    if isinstance(settings, LaunchError) or isinstance(subject.document, LaunchError):
        return Check("start", "skipped", "the configuration comes first")
    if isinstance(found, LaunchError):
        return Check("start", "skipped", "a model comes first")
    try:
        plan = assemble(subject.flags, subject.state_dir, subject.caller, subject.document)
    except LaunchError as error:
        if error.code.startswith(_TOLD):
            return Check("start", "skipped", "the model and the scripts come first")
        key = f'export {API_KEY_VARIABLE}="$(openssl rand -hex 16)"' if error.code == "key_required" else None
        if error.code == "key_file" and error.hint.startswith("chmod"):
            key = error.hint
        return Check("start", "failed", sentence(error), key or subject.edit())
    backend = plan["backend"]
    kind = _BUILT_IN.get(backend["argv"][-1], "its own server") if backend["kind"] == "host" else "its own server"
    return Check("start", "ok", f"{backend['name']} ({kind}) would serve {plan['model']['id']} at {plan['url']}")


def _quoted(text: object) -> str:
    return shlex.quote(str(text))
