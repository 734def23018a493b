"""`mlx-launch bench`: how fast the user's own model answers on this machine, backend by backend."""

import contextlib
import copy
import functools
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mlx_launcher.bench import plot as picture
from mlx_launcher.bench.figures import Outcome, as_json
from mlx_launcher.bench.measure import RUNS, Measured, measure
from mlx_launcher.cli.bench_table import lines
from mlx_launcher.cli.instances import is_locked
from mlx_launcher.cli.launch import make_plan
from mlx_launcher.cli.options import Whole, expanded, json_option, model_options
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.progress import Progress
from mlx_launcher.cli.screen import WIDTH, fit
from mlx_launcher.cli.throwaway import Throwaway, directory, free_port, isolated, stored
from mlx_launcher.config.layers import Flags
from mlx_launcher.errors import EXIT_USAGE, LaunchError
from mlx_launcher.plan import Plan

Say = Callable[[str], None]


@click.command("bench")
@click.option("--backends", metavar="A,B", help="Which to measure. [default: the configured one and its fallback]")
@click.option(
    "--prompt-tokens", type=Whole(1, 10**6), default=2400, show_default=True, help="How long a first request is."
)
@click.option("--turns", type=Whole(1, 100), default=5, show_default=True, help="How often each is measured.")
@click.option(
    "--plot", metavar="FILE", callback=expanded, help="Draw the times into this .png or .svg too; needs matplotlib."
)
@model_options
@json_option
@click.pass_obj
def command(
    app: App, /, backends: str | None, prompt_tokens: int, turns: int, plot: str | None, **server: Any
) -> Result:
    """Measure how fast the model answers on this machine.

    First requests, follow-ups in the same conversation, and follow-ups after a restart of the server, for each backend in turn,
    on a port and with a cache folder of their own. What runs already is left as it is.
    """
    names = _names(backends)
    if plot is not None:
        picture.check(Path(plot))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(sys.stderr, quiet=app.json and not sys.stderr.isatty()))
        stack.enter_context(_one_interrupt())
        root = stack.enter_context(directory(app.state_dir))
        shared = _running(app.state_dir)
        if shared and not app.json:
            ports = ", ".join(map(str, shared))
            click.echo(f"mlx-launch: note: a server runs on port {ports} meanwhile: both share this machine", err=True)
        plans = _Plans(app, root, Flags(host="127.0.0.1", **server), progress.show)
        makers = {name: functools.partial(plans.named, name) for name in names} or plans.defaults()
        asked = functools.partial(measure, tokens=prompt_tokens, conversations=turns, run=secrets.randbelow(RUNS))
        outcomes = [_measured(name, make, asked, progress.show) for name, make in makers.items()]
        model = plans.model
    data = {
        "model": model,
        "prompt_tokens": prompt_tokens,
        "turns": turns,
        "shared_with": shared,
        "backends": [as_json(outcome) for outcome in outcomes],
    }
    failure = _failure(outcomes)
    if plot is not None:
        failure = _drawn(data, Path(plot), failure)
    heading = f"medians of {turns}, ± the middle half"
    shown = [fit(clean(f"model {model['id']}"), WIDTH), heading, "", *lines(outcomes)]
    return Result(data, shown, failure)


def _drawn(data: dict[str, Any], file: Path, failure: LaunchError | None) -> LaunchError | None:
    """Draws what was measured; what failed before goes before that the picture did."""
    try:
        picture.draw(data, file)
    except LaunchError as error:
        return failure or error
    return failure


def _names(written: str | None) -> list[str]:
    """LaunchError `usage` for a list without a name."""
    names = [name.strip() for name in (written or "").split(",")]
    if written is None:
        return []
    if not all(names):
        raise LaunchError("usage", "--backends wants names with a comma between them", "mlx,mlx-legacy", EXIT_USAGE)
    return list(dict.fromkeys(names))


class _Plans:
    """What is measured: each backend by its name, all with the model of the configured one, each on a port of its own."""

    def __init__(self, app: App, root: Path, flags: Flags, say: Callable[..., object]) -> None:
        self._app = copy.copy(app)
        self._app.state_dir = root / "state"
        self._flags = flags
        self._say = say
        self._configured = self.configured()
        self.model = dict(self._configured["model"])

    def defaults(self) -> "dict[str, Callable[[], Plan]]":
        """The configured backend and its fallback, by name."""
        makers = {self._configured["backend"]["name"]: self.configured}
        if fallback := self._configured["fallback"]:
            makers[fallback["name"]] = self._fallback
        return makers

    def configured(self) -> Plan:
        return self._make(self._flags)

    def named(self, name: str) -> Plan:
        """What `start --mode NAME` starts. LaunchError as it has it."""
        model = None if self._flags.demo else self._flags.model or self._configured["model"]["path"] or None
        return self._make(self._flags._replace(mode=name, model=model))

    def _fallback(self) -> Plan:
        """What takes over from the configured one, with its model and its names."""
        plan = self.configured()
        assert plan["fallback"]  # noqa: S101
        return {**plan, "backend": plan["fallback"]}

    def _make(self, flags: Flags) -> Plan:
        return make_plan(self._app, flags._replace(port=free_port()), self._say)


def _measured(name: str, make: Callable[[], Plan], asked: Callable[..., Measured], show: Say) -> Outcome:
    """What came of one backend; its failure is a result too."""

    def say(what: str) -> None:
        show(clean(f"{name}: {what}"))

    try:
        plan = make()
        cache = Path(plan["instance"]) / "kvcache"
        with Throwaway(isolated(plan, cache), say) as server:
            measured = asked(server, say=say)
            server.finish()
        return Outcome(name, measured, stored(cache))
    except LaunchError as error:
        return Outcome(name, error=error)


def _failure(outcomes: list[Outcome]) -> LaunchError | None:
    failed = [outcome for outcome in outcomes if outcome.error]
    if not failed:
        return None
    first = failed[0]
    assert first.error  # noqa: S101
    what = f"{len(failed)} of {len(outcomes)} backends could not be measured; {first.name}: {first.error.message}"
    return LaunchError("bench_failed", what, first.error.hint)


def _running(state_dir: Path) -> list[int]:
    """The ports of the servers that run under a state directory."""
    return sorted(int(path.name) for path in state_dir.iterdir() if path.name.isdecimal() and is_locked(path))


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Any signal that asks us to end is a Ctrl-C, and none after the first disturbs the cleaning up.

    What is ignored stays ignored: that is how nohup has it.
    """
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: handler for number in asking if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
