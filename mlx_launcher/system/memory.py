"""How much memory a model may take on this machine."""

# No pathlib: see the package.
# ruff: noqa: PTH118, PTH120, PTH123

import os
import subprocess
import sys
from typing import NamedTuple

_SYSCTL = ("/usr/sbin/sysctl", "-n", "hw.memsize", "iogpu.wired_limit_mb")
_SYSCTL_S = 5.0
_GPU_SHARE = 0.75  # what macOS lets the GPU wire down unless `iogpu.wired_limit_mb` says otherwise
_CGROUPS = "/sys/fs/cgroup"


class Memory(NamedTuple):
    """`bytes_` is what a model may take; `what` says what that is: "75 % of 36.0 GB, the GPU's share"."""

    bytes_: int
    what: str


def model_memory() -> Memory | None:
    """What a model may take here, None where the system does not tell.

    macOS: the GPU's share. Linux: the machine's memory, or the limit of the cgroup (v2) this process is in.
    """
    if sys.platform == "darwin":
        return parse_sysctl(_sysctl())
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    if limit is not None and limit < total:
        return Memory(limit, f"the cgroup's limit, of {_gigabytes(total)}")
    return Memory(total, "all its memory")


def parse_sysctl(output: str) -> Memory | None:
    """From `sysctl -n hw.memsize iogpu.wired_limit_mb`; the second line is missing before macOS 14, 0 is the default."""
    numbers = [int(line) for line in output.split() if line.isdigit()]
    if not numbers or not numbers[0]:
        return None
    if len(numbers) > 1 and numbers[1]:
        return Memory(numbers[1] << 20, f"the GPU's share (iogpu.wired_limit_mb) of {_gigabytes(numbers[0])}")
    return gpu_share(numbers[0])


def gpu_share(total: int) -> Memory:
    """What a Mac with `total` bytes of memory gives its GPU unless it is told otherwise."""
    share = int(total * _GPU_SHARE)
    return Memory(share, f"{_GPU_SHARE:.0%} of {_gigabytes(total)}, the GPU's share".replace("%", " %", 1))


def cgroup_limit(root: str = _CGROUPS, membership: str = "/proc/self/cgroup") -> int | None:
    """The lowest `memory.max` of this process's cgroup (v2) and those above it; None where there is none."""
    try:
        with open(membership) as file:
            own = next((line.strip()[3:] for line in file if line.startswith("0::/")), None)
    except OSError:
        return None
    if own is None:
        return None
    limits = []
    while True:
        try:
            with open(os.path.join(root, own.strip("/"), "memory.max")) as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # the root has none, and "max" is no limit
            pass
        if own in ("/", ""):
            return min(limits, default=None)
        own = os.path.dirname(own)


def _sysctl() -> str:
    try:
        done = subprocess.run(_SYSCTL, capture_output=True, text=True, timeout=_SYSCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
