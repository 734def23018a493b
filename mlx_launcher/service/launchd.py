"""A launchd agent: its property list, what that was made of, and the commands and answers of `launchctl`. Pure."""

import os
import plistlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from mlx_launcher.errors import LaunchError
from mlx_launcher.service.description import OPEN_FILES, RESTART_S, Service
from mlx_launcher.service.manager import State

_NAME = re.compile(r"mlx-launch\.([1-9][0-9]{0,4})\.plist", re.ASCII)
# What stands one level below the service itself in `launchctl print`; deeper levels repeat some of the names.
_FIELD = re.compile(r"^\t([a-z ]+) = (.*)$", re.MULTILINE)


class Launchd:
    """`Manager` for the agents of the user who is logged in at the screen, whose number is `uid`."""

    name = "launchd"
    still_ending = 36  # EINPROGRESS: "Boot-out failed: 36: Operation now in progress"
    keeps_log = False

    def __init__(self, environment: Mapping[str, str], uid: int) -> None:
        self._home = environment.get("HOME") or str(Path("~").expanduser())
        self._domain = f"gui/{uid}"

    def unit(self, port: int) -> str:
        return f"mlx-launch.{port}"

    def files(self) -> Path:
        return Path(self._home, "Library", "LaunchAgents")

    def file(self, port: int) -> Path:
        return self.files() / f"{self.unit(port)}.plist"

    def links(self, port: int) -> list[Path]:
        return []

    def port(self, file_name: str) -> int | None:
        found = _NAME.fullmatch(file_name)
        return int(found[1]) if found else None

    def key_file(self) -> str:
        return ""

    def text(self, service: Service) -> str:
        agent: dict[str, Any] = {
            "Label": self.unit(service.port),
            "ProgramArguments": list(service.command),
            "WorkingDirectory": service.directory,
            "EnvironmentVariables": dict(sorted(service.environment.items())),
            "RunAtLoad": True,
            # A supervisor that was stopped, or that gave up for good, exits with 0: see `run --service`.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_S,
            "ExitTimeOut": service.stop_s,
            # Any other type has its processor and disk throttled, and a model with it.
            "ProcessType": "Interactive",
            # No hard limit: one that is lower than the system's could never be raised again.
            "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
            "Umask": 0o077,
            "StandardOutPath": service.log,
            "StandardErrorPath": service.log,
        }
        try:
            text = plistlib.dumps(agent, sort_keys=False).decode()
            plistlib.loads(text.encode())  # XML has no way to write control characters
        except (ValueError, UnicodeError, ExpatError):
            what = "a path among the options has signs that no property list can hold"
            raise LaunchError("unit", what, "Rename it, without signs that are not printable") from None
        return text

    def parse(self, text: str) -> Service | None:
        try:
            agent = plistlib.loads(text.encode())
            service = Service(
                command=tuple(agent["ProgramArguments"]),
                environment=dict(agent["EnvironmentVariables"]),
                directory=agent["WorkingDirectory"],
                stop_s=agent["ExitTimeOut"],
                key_file="",
            )
            return service if service.port and "run" in service.command else None
        except (KeyError, ValueError, TypeError, AttributeError, ExpatError):
            return None

    def reachable(self) -> list[str]:
        return ["launchctl", "print-disabled", self._domain]

    def query(self, port: int) -> list[str]:
        return ["launchctl", "print", self._target(port)]

    def state(self, code: int, output: str) -> State:
        said = {name.strip(): value.strip() for name, value in reversed(_FIELD.findall(output))}
        pid, ended = said.get("pid", ""), said.get("last exit code", "")
        signalled = said.get("last terminating signal", "")
        failed = None
        if not pid and signalled:
            failed = f"ended by {signalled}"
        elif not pid and ended.partition(":")[0].isdecimal() and not ended.startswith("0"):
            failed = f"exit status {ended}"
        # Who is known has been loaded from its file, as at every login, unless it was disabled by hand.
        return State(code == 0, code == 0, code == 0 and bool(pid), int(pid) if pid.isdecimal() else None, failed)

    def load(self, port: int) -> list[list[str]]:
        enable = ["launchctl", "enable", self._target(port)]
        return [enable, ["launchctl", "bootstrap", self._domain, os.fspath(self.file(port))]]

    def stop(self, port: int) -> list[list[str]]:
        return [["launchctl", "bootout", self._target(port)]]

    def unload(self, port: int) -> list[list[str]]:
        return self.stop(port)

    def forget(self, port: int) -> list[list[str]]:
        return []

    def start(self, port: int) -> list[str]:
        return ["launchctl", "kickstart", self._target(port)]

    def log(self, port: int) -> str:
        return f"launchctl print {self._target(port)}"

    def _target(self, port: int) -> str:
        return f"{self._domain}/{self.unit(port)}"
