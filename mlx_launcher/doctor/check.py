"""One finding, and what every check is given to look at."""

import shlex
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_launcher.backends.models import Found, demo_directory, find_model, require_model
from mlx_launcher.backends.serving import Caller
from mlx_launcher.backends.which import BUILT_IN, Kind, which
from mlx_launcher.config import defaults
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.errors import LaunchError

# Without quotes: it may be a command with options, as `code --wait` is.
EDITOR = "${EDITOR:-vi}"

Outcome = Literal["ok", "warning", "failed", "skipped"]


class Check(NamedTuple):
    """`found` is one line; `remedy` a command for a shell, None where there is nothing to mend or no command mends it."""

    name: str
    result: Outcome
    found: str
    remedy: str | None = None


class Instance(NamedTuple):
    """One port's directory under the state directory.

    `running`: a supervisor holds its lock. `status` is what that answers, else the last one that was written, {} where there
    is none; `trouble` why it does not answer. `state` is state.json, {} where there is none or it is torn.
    """

    path: Path
    running: bool
    status: dict[str, Any]
    trouble: str | None
    state: dict[str, Any]

    @property
    def port(self) -> int:
        return int(self.path.name)


class Subject:
    """An installation as one command finds it: what it was told, where it looks, and what runs.

    `document` is the configuration, or why `file` cannot be read. `typed(word, port)` is a command of ours as it has to be
    typed, `start` that which starts what is examined. What takes a while to find out is found out once.
    """

    def __init__(
        self,
        flags: Flags,
        environment: Mapping[str, str],
        cwd: str,
        state_dir: Path,
        file: Path | None,
        document: Document | LaunchError,
        instances: list[Instance],
        typed: Callable[[str, int], str],
        start: str,
    ) -> None:
        self.flags = flags
        self.environment = environment
        self.cwd = cwd
        self.state_dir = state_dir
        self.file = file
        self.document = document
        self.instances = instances
        self.typed = typed
        self.start = start

    @cached_property
    def settings(self) -> Settings | LaunchError:
        if isinstance(self.document, LaunchError):
            return self.document
        try:
            return settle(self.flags, self.environment, self.document)
        except LaunchError as error:
            return error

    @cached_property
    def kind(self) -> Kind | LaunchError:
        """What serves, or why that cannot be told."""
        if isinstance(self.settings, LaunchError):
            return self.settings
        try:
            return which(self.settings, self.cwd)
        except LaunchError as error:
            return error

    @cached_property
    def found(self) -> Found | LaunchError:
        """The model that the settings mean, on this machine and whole, or why not. Downloads nothing."""
        settings, kind = self.settings, self.kind
        if isinstance(settings, LaunchError):
            return settings
        if isinstance(kind, LaunchError):
            return kind
        anything = kind.name not in BUILT_IN
        demo = settings.origin("modelPath") == "flag --demo"
        try:
            if demo and not demo_directory(self.state_dir).exists():
                return LaunchError("demo_absent", "the demo model is built when it is started")
            if not demo:
                require_model(settings, self.cwd, self.environment, anything)
            model = find_model(settings, self.state_dir, self.caller, anything)
        except LaunchError as error:
            return error
        return model or LaunchError("no_model", "nothing names a model")

    @property
    def caller(self) -> Caller:
        return Caller([], self.cwd, self.environment)

    @property
    def port(self) -> int:
        """The port that `start` would take, as far as that can be told."""
        if isinstance(self.settings, LaunchError):
            return self.flags.port or defaults.PORT
        return int(self.settings["port"])

    @property
    def instance(self) -> Instance | None:
        """What is known of that port."""
        return next((instance for instance in self.instances if instance.port == self.port), None)

    def plain(self, word: str) -> str:
        """A command of ours that takes no port."""
        return self.typed(word, defaults.PORT)

    def edit(self) -> str | None:
        """A command that opens the configuration file."""
        return f"{EDITOR} {shlex.quote(str(self.file))}" if self.file else None


def sentence(error: LaunchError) -> str:
    """What is wrong, and what to do."""
    return f"{error.message}. {error.hint}" if error.hint else error.message
