"""What every kind of backend has to know about the server that it is to be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_launcher.plan import Model


class Caller(NamedTuple):
    """The command that makes the plan. `argv` is a whole command that prints the same plan again."""

    argv: Sequence[str]
    cwd: str
    environment: Mapping[str, str]


class Serving(NamedTuple):
    """`instance` is the directory of this port's state; `names` are what the model answers to; `url` ends in /v1."""

    model: Model
    names: list[str]
    instance: Path
    host: str
    port: int
    url: str
    api_key: str | None
    require_key: bool

    def probe(self) -> dict[str, object]:
        """What the supervisor has to know to ask a server that binds the port itself."""
        return {"model_id": self.model["id"], "names": self.names, "api_key": self.api_key}
