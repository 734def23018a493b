"""What would be published, tried where nothing of the sources is at hand: `make release-check`.

Builds sdist and wheel, looks at what is in them, installs the wheel by the tested set into an empty environment outside the
tree, and uses it as somebody would who has just installed it. Prints what it does; exits 1 at the first thing that is wrong.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.launched import ROOT, chat, http_request, processes_naming
from support.waiting import free_port, until

# What whoever unpacks the sdist needs to read, test and measure it.
SDIST = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"),
    *("mlx_launcher", "tests", "docs", "scripts", "config", "benchmarks"),
)
# What the installed program reads from its share.
WHEEL = (
    *("share/scripts/mlx-textgen-server.sh", "share/scripts/mlx-server.py"),
    *("share/config/anyclauderc.example.json", "share/constraints.txt"),
)
# Findings of `doctor` that say something of this machine, and nothing of the installation.
OF_THE_MACHINE = {"disk", "port", "device", "open files", "python"}


class WrongError(Exception):
    """What is published would not do."""


def main() -> int:
    scratch = Path(tempfile.mkdtemp(prefix="mlx-launch-release-"))
    try:
        wheel = build(scratch / "dist")
        use(install(wheel, scratch / "venv"), scratch)
    except (WrongError, subprocess.CalledProcessError) as wrong:
        print(f"release-check: {wrong}", file=sys.stderr)
        return 1
    finally:
        for process in processes_naming(str(scratch)):
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    print("release-check: all is well")
    return 0


def say(what: str) -> None:
    print(f"== {what}", flush=True)


def build(where: Path) -> Path:
    """The wheel, which is built from the sdist: so that holds all that is needed."""
    say("sdist and wheel")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(where), str(ROOT)], check=True, stdout=sys.stderr)
    (sdist,), (wheel,) = where.glob("*.tar.gz"), where.glob("*.whl")
    with tarfile.open(sdist) as archive:
        there = [name.partition("/")[2] for name in archive.getnames()]
    with zipfile.ZipFile(wheel) as package:
        inside = package.namelist()
    look(sdist, [name for name in SDIST if not any(path == name or path.startswith(f"{name}/") for path in there)])
    look(wheel, [name for name in WHEEL if f"mlx_launcher/{name}" not in inside])
    strangers = [
        name for name in inside if not name.startswith("mlx_launcher") or "test" in name or name.endswith(".pyc")
    ]
    if strangers:
        raise WrongError(f"{wheel.name} holds {', '.join(strangers[:5])}")
    for built, names in ((sdist, there), (wheel, inside)):
        print(f"{built.name}: {len(names)} files, {built.stat().st_size / 1000:,.0f} kB")
    return wheel


def look(built: Path, missing: Sequence[str]) -> None:
    if missing:
        raise WrongError(f"{built.name} lacks {', '.join(missing)}")


def install(wheel: Path, venv: Path) -> Path:
    """The command in an environment of its own."""
    say("an empty environment, with the wheel and the tested set")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    return venv / "bin" / "mlx-launch"


def use(program: Path, scratch: Path) -> None:
    """As a newcomer does; WrongError where something else comes out than should."""
    home = scratch / "home"
    home.mkdir()
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "PYTHON"))}
    environment |= {"HOME": str(home), "MLX_LAUNCH_STATE_DIR": str(scratch / "state"), "HF_HUB_OFFLINE": "1"}

    def launch(*arguments: str) -> str:
        say(f"mlx-launch {' '.join(arguments)}")
        return said([str(program), *arguments], home, environment)

    version = launch("--version")
    if version.split()[-1] not in (ROOT / "pyproject.toml").read_text():
        raise WrongError(f"--version says {version}")
    doctor = launch("doctor")
    worse = [line for line in doctor.splitlines() if line.startswith("warning") and not of_the_machine(line)]
    if worse:
        raise WrongError(f"doctor warns: {worse[0]}")
    launch("start", "--demo", "--port", str(port))
    say("a chat")
    answer = chat(port, "Hello")
    if answer.status != 200 or not answer.text:
        raise WrongError(f"the chat was answered with {answer.status}: {answer.body.decode()[:200]}")
    print(answer.text)
    models: Any = http_request(port, "/v1/models").json
    print(models["data"][0]["id"])
    launch("status")
    launch("stop")
    until(lambda: not processes_naming(str(scratch)), 10, "the end of every process")


def of_the_machine(line: str) -> bool:
    return any(line.removeprefix("warning").strip().startswith(name) for name in OF_THE_MACHINE)


def said(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise WrongError(f"{Path(command[0]).name} {' '.join(command[1:])} ended with {done.returncode}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
