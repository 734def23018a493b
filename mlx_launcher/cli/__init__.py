"""The command `mlx-launch`: one module per command, loaded when it is asked for, so that `--help` and `status` stay light."""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from mlx_launcher import __version__
from mlx_launcher.cli.groups import Table
from mlx_launcher.cli.output import EXIT_INTERRUPTED, App, Result, abandon_stdout, internal_error, render
from mlx_launcher.errors import EXIT_USAGE, LaunchError

COMMANDS = {
    "start": "Start a server in the background and wait until it is ready.",
    "run": "Run a server in the foreground.",
    "status": "Show what is running and how it is doing.",
    "stop": "Stop the server and leave nothing behind.",
    "restart": "Restart the server with its configuration as it is now.",
    "rollback": "Go to the fallback, verified, and write it into the configuration.",
    "logs": "Show the server's log.",
    "metrics": "Print what a server does, for monitoring.",
    "bench": "Measure how fast the model answers on this machine.",
    "cache": "Look after the KV cache on disk.",
    "models": "List the models on this machine.",
    "doctor": "Check the installation, with the remedy of whatever is wrong.",
    "cluster": "Look at the machines that serve one model together.",
    "service": "Have a server there after every login.",
    "config": "Show, check or write the configuration.",
}
# Programs call these, nobody types them.
HIDDEN = ("plan",)


_MODULES = {name: f"{__name__}.{name}" for name in (*COMMANDS, *HIDDEN)}


@click.group(
    cls=Table,
    table=COMMANDS,
    modules=_MODULES,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="mlx-launch %(version)s")
@click.option("--config", metavar="FILE", help="The configuration file. [default: .anyclauderc.json, here or at home]")
@click.option("--no-config", is_flag=True, help="Read no configuration file.")
@click.option("--state-dir", metavar="DIR", help="Where state is kept. [default: ~/.anyclaude/mlx-launch]")
@click.option("--json", is_flag=True, expose_value=False, help="Write one JSON object to stdout, for scripts.")
@click.pass_context
def _group(ctx: click.Context, config: str | None, no_config: bool, state_dir: str | None) -> None:
    """Start, prove and supervise a local MLX server.

    Try it without a model of your own: mlx-launch start --demo
    """
    from mlx_launcher.config import paths

    app: App = ctx.obj
    app.command = ctx.invoked_subcommand
    app.config, app.no_config = config, no_config
    app.state_dir_given = state_dir is not None
    app.state_dir = paths.state_dir(state_dir, os.environ)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program: runs one command and exits with its code. No exception ever leaves it."""
    _open_standard_streams()
    app = App(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = _run(app)
    except BrokenPipeError:
        abandon_stdout()
        code = 0
    sys.exit(code)


def _run(app: App) -> int:
    try:
        outcome = _group.main(app.arguments or ["--help"], prog_name="mlx-launch", standalone_mode=False, obj=app)
        # --help and --version end with a bare exit code.
        return outcome if isinstance(outcome, int) else render(app, outcome)
    except LaunchError as error:
        return render(app, Result({}, [], error))
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "mlx-launch"
        usage = LaunchError("usage", error.format_message(), f"See {path} --help", EXIT_USAGE)
        return render(app, Result({}, [], usage))
    except (click.Abort, KeyboardInterrupt):
        return render(app, Result({}, [], LaunchError("interrupted", "interrupted", "", EXIT_INTERRUPTED)))
    except BrokenPipeError:
        raise
    except Exception as error:
        return render(app, Result({}, [], internal_error(app, error)))


def _open_standard_streams() -> None:
    """Makes sure that 0, 1 and 2 are open and take any text.

    A caller may have closed them (`>&-`): a plan's file would then get their number. And a path that is not UTF-8, or a
    locale that is not, must not end in a traceback.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
