"""`systemctl --user` or `launchctl`, as far as mlx-launch uses them: it notes how it is called, and starts and ends services.

`service_manager.py DIRECTORY systemctl|launchctl ARGUMENT...`: what it knows is in DIRECTORY/known.json, what it was called with
in DIRECTORY/calls. A file DIRECTORY/refuses makes the command that is named in it fail.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mlx_launcher.service.description import Service
from mlx_launcher.service.launchd import Launchd
from mlx_launcher.service.systemd import Systemd

_READY_S = 30.0
SYSTEMD = Systemd(os.environ)
LAUNCHD = Launchd(os.environ, os.getuid())


class Known:
    """What it knows of its services: by name, the pid and whether they are enabled."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.of: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def save(self) -> None:
        self._file.write_text(json.dumps(self.of))

    def pid(self, name: str) -> int | None:
        pid = self.of.get(name, {}).get("pid")
        return int(pid) if pid and running(pid) else None

    def note(self, name: str, **what: Any) -> None:
        self.of.setdefault(name, {}).update(what)


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(pid: int | None) -> None:
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        while running(pid):
            time.sleep(0.02)


def start(service: Service, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        service.command,
        cwd=service.directory,
        env={**service.environment, **environment},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def notify_until_ready(service: Service, address: str) -> int | None:
    """As with Type=notify: it is started, and is up when it says so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{address[1:]}")
        sock.settimeout(0.1)
        process = start(service, NOTIFY_SOCKET=address)
        deadline = time.monotonic() + _READY_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if b"READY=1" in sock.recv(4096):
                    return process.pid
            except TimeoutError:
                continue
    return None


def systemctl(here: Path, known: Known, verb: str, rest: list[str]) -> int:
    name = rest[-1] if rest else ""
    port = SYSTEMD.port(name)
    file = SYSTEMD.file(port) if port else Path("/nowhere")
    link = SYSTEMD.links(port)[0] if port else Path("/nowhere")
    pid = known.pid(name)
    if verb == "show" and port:
        print(f"LoadState={'loaded' if file.exists() else 'not-found'}")
        print(f"ActiveState={'active' if pid else 'inactive'}\nMainPID={pid or 0}")
        print(f"UnitFileState={'enabled' if link.is_symlink() else 'disabled'}\nResult=success")
    elif verb == "enable":
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    elif verb in ("disable", "stop"):
        end(pid)
        if verb == "disable":
            link.unlink(missing_ok=True)
    elif verb == "restart":
        end(pid)
        service = SYSTEMD.parse(file.read_text())
        address = f"@{here}/{os.getpid()}"
        pid = notify_until_ready(service, address) if service else None
        known.note(name, pid=pid)
        return 0 if pid else 1
    return 0


def launchctl(known: Known, verb: str, rest: list[str]) -> int:
    label = rest[0].rpartition("/")[2] if rest else ""
    if verb == "bootstrap":
        file = Path(rest[1])
        service = LAUNCHD.parse(file.read_text())
        known.note(file.stem, pid=start(service).pid if service else None)
    elif verb == "bootout":
        pid = known.pid(label)
        known.of.pop(label, None)
        known.save()
        end(pid)
    elif verb == "print":
        if label not in known.of:
            print("Bad request.", file=sys.stderr)
            return 113
        pid = known.pid(label)
        print(f"{rest[0]} = {{\n\tactive count = {int(bool(pid))}\n\tstate = {'running' if pid else 'not running'}\n")
        print(f"\tpid = {pid}\n}}" if pid else "\tlast exit code = 0\n}")
    return 0


def main(directory: str, program: str, *arguments: str) -> int:
    here = Path(directory)
    with (here / "calls").open("a") as calls:
        calls.write(" ".join([program, *arguments]) + "\n")
    words = [word for word in arguments if word != "--user"]
    refuses = here / "refuses"
    if refuses.exists() and refuses.read_text() == words[0]:
        print(f"{words[0]}: refused", file=sys.stderr)
        return 1
    known = Known(here / "known.json")
    code = (
        systemctl(here, known, words[0], words[1:]) if program == "systemctl" else launchctl(known, words[0], words[1:])
    )
    known.save()
    return code


sys.exit(main(*sys.argv[1:]))
