"""The interpreter, and the device that MLX finds from it."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from mlx_launcher.doctor.check import Check
from mlx_launcher.system.machine import Machine

# MLX's wheels, in November 2026: these Pythons, macOS on Apple Silicon from 14 on, glibc from 2.35 on.
_OLDEST, _NEWEST = (3, 11), (3, 14)
_MACOS, _GLIBC = (14,), (2, 35)
_PROBE_S = 3.0
# Of a process of its own: importing mlx costs memory and, on a GPU, seconds. One number is computed, to see that it can.
_PROBE = """
import json
import mlx.core as mx
mx.eval(mx.ones(1) + 1)
cuda = getattr(mx, "cuda", None)
info = mx.device_info()
name = info.get("device_name") or info.get("architecture") or ""
print(json.dumps({
    "version": mx.__version__, "gpu": "gpu" in str(mx.default_device()).lower(), "name": str(name),
    "metal": mx.metal.is_available(), "cuda": bool(cuda and cuda.is_available()),
}))
"""


def interpreter(version: tuple[int, ...], machine: Machine, executable: str) -> Check:
    """Whether MLX has a build for this Python."""
    number = ".".join(map(str, version))
    what = f"Python {number} for {machine.arch} ({executable})"
    if machine.translated:
        what += " runs under Rosetta, and MLX has builds for arm64 only"
        return Check("python", "failed", what, "arch -arm64 /opt/homebrew/bin/brew install python@3.12")
    if machine.platform == "darwin" and machine.arch != "arm64":
        return Check("python", "failed", f"{what}: MLX has no build for Intel Macs")
    if version[:2] < _OLDEST:
        return Check("python", "failed", f"{what}: 3.11 or newer is needed", "make clean start PYTHON=python3.12")
    if machine.macos is not None and machine.macos < _MACOS:
        found = f"macOS {'.'.join(map(str, machine.macos))}: MLX needs macOS 14 or newer"
        return Check("python", "failed", found, "softwareupdate --list")
    if machine.platform == "linux" and (machine.glibc is None or machine.glibc < _GLIBC):
        libc = f"glibc {'.'.join(map(str, machine.glibc))}" if machine.glibc else "no glibc"
        return Check("python", "failed", f"{what}, {libc}: MLX needs glibc 2.35 or newer")
    if version[:2] > _NEWEST:
        newest = ".".join(map(str, _NEWEST))
        found = f"{what}: the newest that MLX has builds for was {newest}"
        return Check("python", "warning", found, f"make clean start PYTHON=python{newest}")
    return Check("python", "ok", what)


def device(machine: Machine, pins: Mapping[str, str], patience_s: float | None = None) -> Check:
    """What MLX computes on, asked in a process of its own; `pins` are the tested versions."""
    patience_s = patience_s or _PROBE_S
    command = [sys.executable, "-P", "-c", _PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience_s, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        what = f"MLX did not compute one number within {patience_s:g} s; the first time after an installation may take longer"
        return Check("device", "warning", what, f'{shlex.quote(sys.executable)} -c "import mlx.core"')
    try:
        report = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        return broken(machine, said[-1] if said else f"the process ended with {done.returncode}", pins)
    return computes_on(machine, report)


def computes_on(machine: Machine, report: Mapping[str, Any]) -> Check:
    """The finding for what a working MLX says of itself."""
    kind = "Metal" if report["metal"] else "CUDA" if report["cuda"] else "CPU"
    what = f"MLX {report['version']} computes on {kind}"
    what += f": {report['name']}" if report["name"] else ""
    if machine.platform == "darwin" and not (report["metal"] and report["gpu"]):
        pin = f"{_pip()} --force-reinstall --no-deps mlx-metal=={report['version']}"
        return Check("device", "failed", f"{what}, and a Mac serves with its GPU", pin)
    if machine.nvidia and not report["cuda"]:
        # The second for its files: mlx-cpu, which is a requirement on Linux, has a libmlx.so at the same path.
        install = f"{_pip()} 'mlx[cuda13]=={report['version']}'"
        last = f"{_pip()} --force-reinstall --no-deps mlx-cuda-13=={report['version']}"
        return Check("device", "warning", f"{what}, and there is an NVIDIA GPU", f"{install} && {last}")
    return Check("device", "ok", what)


def broken(machine: Machine, said: str, pins: Mapping[str, str]) -> Check:
    """The finding for an MLX that cannot be imported, or not compute; `said` is its last line."""
    what = f"MLX does not work: {said}"
    wanted = "mlx"
    if machine.platform == "linux":
        wanted = "mlx[cpu]"
        if "libmlx" in said:
            what = f"MLX has no backend, as after a plain `pip install mlx` on Linux: {said}"
        elif "libcuda" in said:
            what = f"MLX is the build for CUDA, and no NVIDIA driver is found: {said}"
    packages = [f"{wanted}=={pins['mlx']}" if "mlx" in pins else wanted]
    packages += [f"{name}=={pins[name]}" for name in ("mlx-cpu", "mlx-metal") if name in pins]
    words = " ".join(f"'{word}'" if "[" in word else word for word in packages)
    return Check("device", "failed", what, f"{_pip()} --force-reinstall --no-deps {words}")


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip install"
