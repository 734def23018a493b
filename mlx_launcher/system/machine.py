"""What kind of machine and interpreter this is, as far as MLX cares."""

# No pathlib: see the package.
# ruff: noqa: PTH110

import os
import subprocess
import sys
from typing import NamedTuple

_TRANSLATED = ("/usr/sbin/sysctl", "-n", "sysctl.proc_translated")
_SYSCTL_S = 2.0
_NVIDIA = "/proc/driver/nvidia/version"


class Machine(NamedTuple):
    """`platform` and `arch` are what the interpreter was built for; `translated`: it runs under Rosetta.

    `macos` and `glibc` are versions, None where there is none of the kind. `nvidia`: a driver of an NVIDIA GPU is loaded.
    """

    platform: str
    arch: str
    translated: bool = False
    macos: tuple[int, ...] | None = None
    glibc: tuple[int, ...] | None = None
    nvidia: bool = False


def machine() -> Machine:
    arch = os.uname().machine
    if sys.platform == "darwin":
        import platform

        return Machine("darwin", arch, _sysctl() == "1", macos=version(platform.mac_ver()[0]))
    return Machine(sys.platform, arch, glibc=_glibc(), nvidia=os.path.exists(_NVIDIA))


def version(text: str) -> tuple[int, ...] | None:
    """The numbers at the beginning of "14.6.1" or "2.35-0ubuntu"; None where there are none."""
    numbers: list[int] = []
    for part in text.split("-")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers) or None


def _glibc() -> tuple[int, ...] | None:
    try:
        return version((os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc "))
    except (OSError, ValueError):  # musl knows no such name
        return None


def _sysctl() -> str:
    """ "1" under Rosetta, "0" without, and nothing on an Intel Mac, which does not know the name."""
    try:
        done = subprocess.run(_TRANSLATED, capture_output=True, text=True, timeout=_SYSCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
