"""What systemd and launchd have in common: a file for each service, programs to be called, and an answer to be read."""

from pathlib import Path
from typing import NamedTuple, Protocol

from mlx_launcher.service.description import Service


class State(NamedTuple):
    """What a manager says of a service.

    `loaded`: it knows it. `enabled`: it is started at the next login. `active`: it is running, starting or stopping, and
    `pid` is whose. `failed` is how it ended, where that was not as it should.
    """

    loaded: bool
    enabled: bool
    active: bool
    pid: int | None
    failed: str | None


class Manager(Protocol):
    """Pure: commands are returned, answers are handed in. A port names a service."""

    name: str
    still_ending: int  # the exit code of a stop that goes on by itself; 0 where there is none
    keeps_log: bool  # of what a service prints; where it does not, that goes to the service's `log`

    def unit(self, port: int) -> str:
        """What the manager calls it."""

    def file(self, port: int) -> Path: ...

    def links(self, port: int) -> list[Path]:
        """What else may lie on the disk for it."""

    def files(self) -> Path:
        """The directory of all of them."""

    def port(self, file_name: str) -> int | None:
        """Whose file that is, None for a file that is none of ours."""

    def key_file(self) -> str:
        """Where a key may be kept besides the configuration; "" where the manager reads no such file."""

    def text(self, service: Service) -> str:
        """The whole file. LaunchError `unit` for what cannot be written into one."""

    def parse(self, text: str) -> Service | None:
        """What `text` was made of; None when it was not."""

    def reachable(self) -> list[str]:
        """A command that fails when there is no manager to talk to."""

    def query(self, port: int) -> list[str]: ...

    def state(self, code: int, output: str) -> State:
        """From what `query` printed, and its exit code."""

    def load(self, port: int) -> list[list[str]]:
        """Commands that make it known, have it started at login, and start it now."""

    def stop(self, port: int) -> list[list[str]]:
        """Commands that end one that is known, before another takes its place."""

    def unload(self, port: int) -> list[list[str]]:
        """Commands that end it and have it started no more."""

    def forget(self, port: int) -> list[list[str]]:
        """Commands for after the file is gone; they may fail."""

    def start(self, port: int) -> list[str]:
        """The command that starts one that is known and does not run."""

    def log(self, port: int) -> str:
        """The command that shows what the manager says of it."""
