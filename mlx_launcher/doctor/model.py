"""The model: whole, known, served by which backend, with what context, and whether it fits into this machine."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlx_launcher.backends.which import BUILT_IN, Kind
from mlx_launcher.config.layers import Settings, names_a_model
from mlx_launcher.doctor.check import Check, Subject, sentence
from mlx_launcher.doctor.model_files import contradiction
from mlx_launcher.errors import LaunchError
from mlx_launcher.models import facts as about
from mlx_launcher.models import fit
from mlx_launcher.models.directory import BrokenModelError
from mlx_launcher.system.memory import Memory

# Where the hub's cache keeps a model: what lies there is completed by starting it under its name.
_OF_HUB = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")


def model(subject: Subject, memory: Memory | None) -> Iterator[Check]:
    """One finding about the files and who serves them, one about their size."""
    settings, kind = subject.settings, subject.kind
    if isinstance(settings, LaunchError) or isinstance(kind, LaunchError):
        yield Check("model", "skipped", "the configuration comes first")
        return
    found = subject.found
    if isinstance(found, LaunchError):
        running = _of_running(subject)
        if running is not None and not _is_named(subject):
            yield from _look(subject, settings, kind, running, memory)
        else:
            yield _missing(subject, settings, found)
    elif kind.name not in BUILT_IN:
        yield Check("model", "ok", f"{found.model['id']} is for {settings.block}'s own server to judge")
    else:
        yield from _look(subject, settings, kind, Path(found.model["path"]), memory)


def _is_named(subject: Subject) -> bool:
    return subject.file is not None or names_a_model(subject.flags, subject.environment)


def _of_running(subject: Subject) -> Path | None:
    instance = subject.instance
    path = instance.status.get("model", {}).get("path") if instance and instance.running else None
    return Path(path) if path else None


def _missing(subject: Subject, settings: Settings, error: LaunchError) -> Check:
    """What to say where no whole model is on this machine."""
    if error.code == "demo_absent":
        return Check("model", "ok", error.message)
    if error.code == "no_model" and not _is_named(subject):
        return Check("model", "skipped", "nothing names a model", subject.plain("models"))
    if error.code == "no_model" and settings["command"] is not None:
        return Check("model", "skipped", "none is named, and the command needs none")
    if error.code == "model_absent":
        return Check("model", "warning", sentence(error), subject.start)
    return Check("model", "failed", sentence(error), _remedy(subject, error.message))


def _remedy(subject: Subject, text: str) -> str:
    if "Permission denied" in text and (file := re.search(r"(/.+?)/?(?:config\.json)? cannot be read", text)):
        return f"chmod -R u+rX {shlex.quote(file[1])}"
    if hub := _OF_HUB.search(text):
        return f"{subject.start} --model={shlex.quote(f'{hub[1]}/{hub[2]}')}"
    return subject.plain("models")


def _look(subject: Subject, settings: Settings, kind: Kind, path: Path, memory: Memory | None) -> Iterator[Check]:
    try:
        model = about.facts(path)
        wrong = contradiction(path)
    except BrokenModelError as error:
        yield Check("model", "failed", f"{error.reason}. {error.hint}", _remedy(subject, error.reason))
        return
    if wrong is not None:
        yield Check("model", "failed", f"{wrong}. Download the model again", _remedy(subject, wrong))
        return
    yield _served(subject, settings, kind, model)
    if kind.name == "cluster":
        yield Check("memory", "skipped", "each machine of a cluster holds a part of it")
    else:
        yield _size(subject, model, memory)


def _served(subject: Subject, settings: Settings, kind: Kind, model: about.Facts) -> Check:
    if not model.known:
        what = f"the architecture {model.architecture} of {model.path} is none that the installed mlx-lm can load"
        return Check("model", "failed", what, subject.plain("models"))
    reason = about.why_not_textgen(model)
    if kind.name == "textgen" and reason is not None:
        legacy = f"{subject.start} --mode=mlx-legacy"
        if not settings["fallback"]:
            return Check("model", "failed", f"{reason}; there is no fallback", legacy)
        return Check("model", "warning", f"{reason}; each start ends on the fallback", legacy)
    weights = str(model.quantization or model.dtype)
    context = f"context {model.context:,} tokens" if model.context else "context unknown"
    by = about.TEXTGEN if kind.name == "textgen" else about.LEGACY
    what = f"{model.path} is whole: {model.architecture}, {model.cache} cache, {weights}, {context}, served by {by}"
    if model.context is not None and model.context < fit.PROMPT_TOKENS:
        return Check("model", "warning", f"{what}; that is short for an agent's prompt", subject.plain("models"))
    return Check("model", "ok", what)


def _size(subject: Subject, model: about.Facts, memory: Memory | None) -> Check:
    needed = fit.needed_bytes(model)
    what = f"{_gigabytes(model.weight_bytes)} of weights, {_gigabytes(needed)} with a prompt"
    if memory is None:
        return Check("memory", "skipped", f"{what}; this machine does not tell how much it has")
    what += f"; {_gigabytes(memory.bytes_)} for it ({memory.what})"
    fits = fit.judge(model, memory)
    if fits == "yes":
        return Check("memory", "ok", what)
    if fits == "tight" or subject.flags.force:
        return Check(
            "memory", "warning", f"{what}: {'tight' if fits == 'tight' else 'too large'}", subject.plain("models")
        )
    return Check("memory", "failed", f"{what}: it does not fit", subject.plain("models"))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
