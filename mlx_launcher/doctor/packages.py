"""The installed set against the tested one: what is missing, what is out of range, what has drifted, and what that breaks."""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import NamedTuple

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mlx_launcher.doctor.check import Check

OURS = "mlx-launcher"
_SHOWN = 6
_MODULES = (".py", ".so")

# What is known of versions that were not tested, by package, first match first. The facts are in docs/architecture.md.
_BREAKS: dict[str, tuple[tuple[str, str], ...]] = {
    "mlx": (
        ("<0.31.2", "its streams belong to all threads there, and torn weights load as garbage"),
        (">=0.33", "not tried: releases before it have broken mlx-textgen"),
    ),
    "mlx-textgen": ((">0", "its defects are corrected as 0.2.1 has them"),),
    "mlx-lm": ((">0", "which models are served is read from its sources, and KV caches are kept by its functions"),),
    "mlx-vlm": ((">0", "models with a vision part are loaded through it"),),
    "transformers": ((">=6", "not tried: tokenizers and chat templates come from it"),),
    "outlines": (("<1", "0.2.x pulls in torch: imports took 38 s instead of 6 s, and 5 to 7 GB more of disk"),),
    "llguidance": ((">0", "tool calls are kept to their schemas by it"),),
    "huggingface-hub": ((">=3", "downloads use a function of it that its documentation does not name"),),
}


class Need(NamedTuple):
    """`parent` requires this."""

    parent: str
    requirement: Requirement

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)


class Installed(NamedTuple):
    """A distribution as its metadata describe it; `gone` is a file of the first level that they name and that is not there."""

    version: str
    requires: list[str]
    gone: str | None


def pinned(text: str) -> dict[str, str]:
    """The versions in constraints.txt that count on this system, by canonical name."""
    pins: dict[str, str] = {}
    for line in text.splitlines():
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:  # a comment, an empty line
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            pins[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return pins


def packages(pins: Mapping[str, str]) -> list[Check]:
    """One finding for each package that is missing or out of range, one for all that merely differ from `pins`."""
    installed: dict[str, Installed | None] = {}
    needs = list(_needs(installed))
    if not needs:
        return [Check("packages", "skipped", f"{OURS} is not installed: it runs from its sources")]
    versions = {name: found.version for name, found in installed.items() if found}
    wrong = {need.name: check for need in needs if (check := _judge(need, versions.get(need.name), pins))}
    drifted = {
        name: version
        for name, version in sorted(versions.items())
        if version != pins.get(name, version) and name not in wrong
    }
    gone = {name: found.gone for name, found in sorted(installed.items()) if found and found.gone and name not in wrong}
    checks = [*wrong.values(), *([_gone(gone, pins)] if gone else []), *([_drift(drifted, pins)] if drifted else [])]
    return checks or [Check("packages", "ok", f"all {len(installed) - 1} are as tested")]


def _needs(installed: dict[str, Installed | None]) -> Iterator[Need]:
    """Everything that the program requires, directly and not, without the extras that nobody asked for.

    What is found of each goes into `installed`.
    """
    environment = {key: str(value) for key, value in default_environment().items()}
    waiting: list[tuple[str, str]] = [(OURS, "")]
    seen = set(waiting)
    while waiting:
        parent, extra = waiting.pop()
        if parent not in installed:
            installed[parent] = _installed(parent)
        found = installed[parent]
        for text in found.requires if found else ():
            if ("extra" in text.partition(";")[2]) != bool(extra):
                continue  # of an extra that nobody asked for, or told already, without the extra
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            need = Need(parent, requirement)
            yield need
            for step in [(need.name, ""), *((need.name, wanted) for wanted in requirement.extras)]:
                if step not in seen:
                    seen.add(step)
                    waiting.append(step)


def _installed(name: str) -> Installed | None:
    """Read line by line: the library's own parser takes several times as long, most of it for the text below the header."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    text = found.read_text("METADATA") or ""
    header = [line.partition(": ") for line in text.partition("\n\n")[0].splitlines()]
    versions = [value.strip() for key, _, value in header if key == "Version"]
    requires = [value for key, _, value in header if key == "Requires-Dist"]
    return Installed(versions[0] if versions else "", requires, _missing_file(found))


def _missing_file(found: metadata.Distribution) -> str | None:
    """Of the modules at the top, and right within the packages there: a directory that was deleted lacks them all."""
    names = (line.partition(",")[0] for line in (found.read_text("RECORD") or "").splitlines())
    # What begins with .. is a command or a page of a manual; a name in quotes has a comma.
    top = (name for name in names if name.endswith(_MODULES) and name.count("/") <= 1 and name[0] not in './"')
    return next((name for name in top if not os.path.exists(str(found.locate_file(name)))), None)  # noqa: PTH110


def _judge(need: Need, version: str | None, pins: Mapping[str, str]) -> Check | None:
    """What is wrong with the version, None where it satisfies what is required."""
    wanted = need.requirement.specifier
    if version is None:
        what = f"{need.name} is not installed, and {need.parent} needs it"
        return Check("packages", "failed", what, _install([need.name], pins))
    if wanted.contains(version, prereleases=True):
        return None
    what = f"{need.name} is {version}, and {need.parent} wants {wanted}{_what_breaks(need.name, version)}"
    # What is ours to say has been tried; what others say of each other often has not.
    return Check("packages", "failed" if need.parent == OURS else "warning", what, _install([need.name], pins))


def _gone(gone: Mapping[str, str], pins: Mapping[str, str]) -> Check:
    told = [f"{name} is installed, and its {file} is gone" for name, file in list(gone.items())[:_SHOWN]]
    more = f"; and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
    return Check("packages", "failed", "; ".join(told) + more, _install(gone, pins, "--force-reinstall", "--no-deps"))


def _drift(drifted: Mapping[str, str], pins: Mapping[str, str]) -> Check:
    known = sorted(drifted, key=lambda name: (name not in _BREAKS, name))
    told = [
        f"{name} {drifted[name]} instead of {pins[name]}{_what_breaks(name, drifted[name])}" for name in known[:_SHOWN]
    ]
    more = f"; and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return Check("packages", "warning", f"not as tested: {'; '.join(told)}{more}", _install(known, pins))


def _what_breaks(name: str, version: str) -> str:
    try:
        number = Version(version)
    except InvalidVersion:
        return ""
    for which, text in _BREAKS.get(name, ()):
        if SpecifierSet(which).contains(number, prereleases=True):
            return f" ({text})"
    return ""


def _install(names: Iterable[str], pins: Mapping[str, str], *options: str) -> str:
    words = [*options, *(f"{name}=={pins[name]}" if name in pins else name for name in names)]
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.join(words)}"
