"""A systemd user unit: its text, what it was made of, and the commands and answers of `systemctl --user`. Pure."""

import re
from collections.abc import Mapping
from pathlib import Path

from mlx_launcher.config import defaults
from mlx_launcher.errors import LaunchError
from mlx_launcher.service.description import OPEN_FILES, RESTART_S, RESTART_WINDOW_S, RESTARTS, Service
from mlx_launcher.service.manager import State

_SYSTEMCTL = ["systemctl", "--user"]
_PROPERTIES = ("LoadState", "ActiveState", "UnitFileState", "MainPID", "Result", "ExecMainStatus")
# The exit codes of CLI.md that another try does not mend: it gave up, or it was told something that it cannot do.
_FINAL_CODES = "1 2 4 5"
# How long the loop may stand still. It turns every second.
_WATCHDOG_S = 30
# From the first line of Python to the port; a model is loaded after that.
_START_S = 90
# How far a server may raise that for itself: what systemd allows unless it is told otherwise.
_MOST_FILES = 524288
_NAME = re.compile(r"mlx-launch(?:-([1-9][0-9]{0,4}))?\.service", re.ASCII)
_TEMPLATE = """\
# Written by mlx-launch service install; mlx-launch service uninstall takes it away. It holds no key.

[Unit]
Description=mlx-launch on port {port}
StartLimitIntervalSec={window_s}
StartLimitBurst={restarts}

[Service]
# Ready when the port is bound, long before the model is loaded: clients wait in the socket.
Type=notify
NotifyAccess=main
ExecStart={command}
ExecReload=kill -HUP $MAINPID
WorkingDirectory={directory}
{environment}
{key_file}
TimeoutStartSec={start_s}
TimeoutStopSec={stop_s}
# Fed by the supervisor's loop, and only while it turns.
WatchdogSec={watchdog_s}
Restart=on-failure
RestartSec={restart_s}
# It gave up (1), or cannot do what it was told (2, 4, 5): another try would end the same.
RestartPreventExitStatus={final_codes}
# The supervisor ends its server itself; what is left then is killed.
KillMode=mixed
# A server that the kernel kills for its memory is the supervisor's to replace.
OOMPolicy=continue
LimitNOFILE={open_files}:{most_files}
# What MLX survives, and what needs no privilege: not MemoryDenyWriteExecute, it compiles; no namespaces, a user has none
# on every system.
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes

[Install]
WantedBy=default.target
"""


class Systemd:
    """`Manager` for a user's own units. `environment` says where they lie."""

    name = "systemd"
    still_ending = 0
    keeps_log = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        home = environment.get("HOME") or str(Path("~").expanduser())
        configured = environment.get("XDG_CONFIG_HOME") or ""
        self._config = Path(configured) if configured.startswith("/") else Path(home, ".config")

    def unit(self, port: int) -> str:
        return "mlx-launch.service" if port == defaults.PORT else f"mlx-launch-{port}.service"

    def files(self) -> Path:
        return self._config / "systemd" / "user"

    def file(self, port: int) -> Path:
        return self.files() / self.unit(port)

    def links(self, port: int) -> list[Path]:
        return [self.files() / "default.target.wants" / self.unit(port)]

    def port(self, file_name: str) -> int | None:
        if (found := _NAME.fullmatch(file_name)) is None:
            return None
        return int(found[1]) if found[1] else defaults.PORT

    def key_file(self) -> str:
        return str(self._config / "mlx-launch" / "service.env")

    def text(self, service: Service) -> str:
        program, *rest = service.command
        pairs = (f"{name}={value}" for name, value in sorted(service.environment.items()))
        return _TEMPLATE.format(
            port=service.port,
            command=" ".join([quoted(program), *(quoted(word).replace("$", "$$") for word in rest)]),
            directory=_plain(service.directory),
            environment="\n".join(f"Environment={quoted(pair)}" for pair in pairs),
            key_file=f"EnvironmentFile=-{_plain(service.key_file)}",
            start_s=_START_S,
            stop_s=service.stop_s,
            watchdog_s=_WATCHDOG_S,
            restart_s=RESTART_S,
            restarts=RESTARTS,
            window_s=RESTART_WINDOW_S,
            final_codes=_FINAL_CODES,
            open_files=OPEN_FILES,
            most_files=_MOST_FILES,
        )

    def parse(self, text: str) -> Service | None:
        found: dict[str, list[str]] = {}
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals:
                found.setdefault(key, []).append(value)
        try:
            program, *rest = unquoted(found["ExecStart"][0])
            command = (program, *(word.replace("$$", "$") for word in rest))
            pairs = [unquoted(line)[0].partition("=") for line in found.get("Environment", [])]
            service = Service(
                command=command,
                environment={name: value for name, _, value in pairs},
                directory=found["WorkingDirectory"][0].replace("%%", "%"),
                stop_s=int(found["TimeoutStopSec"][0]),
                key_file=found["EnvironmentFile"][0].removeprefix("-").replace("%%", "%"),
            )
            return service if service.port and "run" in command else None
        except (KeyError, ValueError, IndexError):
            return None

    def reachable(self) -> list[str]:
        return [*_SYSTEMCTL, "show", "--property=Version"]

    def query(self, port: int) -> list[str]:
        return [*_SYSTEMCTL, "show", f"--property={','.join(_PROPERTIES)}", self.unit(port)]

    def state(self, code: int, output: str) -> State:
        said = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        active = said.get("ActiveState") in ("active", "activating", "deactivating", "reloading")
        pid = said.get("MainPID", "0")
        result = said.get("Result", "success")
        failed = None
        if said.get("ActiveState") == "failed" or (not active and result not in ("success", "")):
            failed = f"{result}, exit status {said.get('ExecMainStatus', '?')}"
        return State(
            loaded=code == 0 and said.get("LoadState") not in (None, "not-found"),
            enabled=said.get("UnitFileState") in ("enabled", "enabled-runtime"),
            active=active,
            pid=int(pid) if active and pid.isdecimal() and pid != "0" else None,
            failed=failed,
        )

    def load(self, port: int) -> list[list[str]]:
        unit = self.unit(port)
        return [[*_SYSTEMCTL, "daemon-reload"], [*_SYSTEMCTL, "enable", unit], self.start(port)]

    def stop(self, port: int) -> list[list[str]]:
        return [[*_SYSTEMCTL, "stop", self.unit(port)]]

    def unload(self, port: int) -> list[list[str]]:
        return [[*_SYSTEMCTL, "disable", "--now", self.unit(port)]]

    def forget(self, port: int) -> list[list[str]]:
        return [[*_SYSTEMCTL, "daemon-reload"], [*_SYSTEMCTL, "reset-failed", self.unit(port)]]

    def start(self, port: int) -> list[str]:
        # Not start: it does nothing about one that just failed too often, nor about one whose unit has changed.
        return [*_SYSTEMCTL, "restart", self.unit(port)]

    def log(self, port: int) -> str:
        return f"journalctl --user --unit {self.unit(port)} --no-pager --lines 20"


def quoted(word: str) -> str:
    """One word as systemd reads it back: always in quotes, escaped as C does, `%` doubled because it names specifiers."""
    return '"' + _plain(word).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(text: str) -> str:
    """What is taken as it is to the end of the line. LaunchError `unit` for what no line can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _unwritable(text) from None
    if not text.isprintable() or text != text.strip() or text.endswith("\\"):
        raise _unwritable(text)
    return text.replace("%", "%%")


def _unwritable(text: str) -> LaunchError:
    what = f"{text.encode('utf-8', 'replace').decode()!r} cannot be written into a systemd unit"
    return LaunchError("unit", what, "Rename it, without signs that are not printable")


def unquoted(line: str) -> list[str]:
    """The words of a line of `quoted` ones. ValueError where it is none."""
    if not re.fullmatch(r'(?:"(?:[^"\\]|\\.)*"(?: |$))+', line):
        raise ValueError(line)
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', line)
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%") for word in words]
