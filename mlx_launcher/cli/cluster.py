"""`mlx-launch cluster`: several machines that serve one model."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click

from mlx_launcher.backends import cluster as machines
from mlx_launcher.backends.models import find_model, no_model
from mlx_launcher.backends.serving import Caller
from mlx_launcher.cli.configured import current_directory
from mlx_launcher.cli.groups import Table
from mlx_launcher.cli.launch import build_demo_model, document_to_serve
from mlx_launcher.cli.options import json_option, model_options
from mlx_launcher.cli.output import App, Result, clean
from mlx_launcher.cli.screen import WIDTH, wrapped
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.errors import LaunchError

_PROBE_S = 60.0
_RESULT, _LABEL = 10, 10  # columns


class Check(NamedTuple):
    """What was looked at on a machine; `hint` is the remedy of what failed."""

    name: str
    ok: bool
    message: str
    hint: str = ""


@click.group(
    "cluster",
    cls=Table,
    table={
        "check": "Check each machine, with the remedy of whatever is wrong.",
        "size": "Compute what each machine needs, and what bounds its speed.",
    },
    modules={"size": "mlx_launcher.cli.cluster_size"},
    no_args_is_help=False,
)
@json_option
def command() -> None:
    """Look at the machines that serve one model together."""


@command.command("check")
@model_options
@json_option
@click.pass_obj
def check_(app: App, /, **given: Any) -> Result:
    """Check each machine of the cluster, with the remedy of whatever is wrong.

    That the model can be split among them; of each that ssh reaches it without a question, that Python and the packages are
    the same as here, that the model is there and the same, that its addresses are its own, and JACCL where it is asked for.
    Exits with 1 if anything fails.
    """
    cwd = current_directory()
    flags = Flags(**given)
    settings = settle(flags, os.environ, document_to_serve(app, flags))
    if flags.demo:
        create_state_dir(app.state_dir)
        build_demo_model(app.state_dir)
    found = find_model(settings, app.state_dir, Caller([], cwd, os.environ))
    if found is None:
        raise no_model(settings)
    cluster = machines.members(settings, cwd)
    path = found.model["path"]
    with ThreadPoolExecutor(len(cluster.members)) as pool:
        probes = list(pool.map(lambda member: _probe(settings, member, path), cluster.members))
    jaccl = settings["distributed.connection"] == "jaccl" or cluster.backend == "jaccl"
    here = probes[0] if isinstance(probes[0], dict) else {}
    data: list[dict[str, Any]] = []
    split = _split(path, len(cluster.members), settings["distributed.strategy"])
    lines = ["all machines", *_lines(split)]
    bad = int(not split.ok)
    for rank, (member, probe) in enumerate(zip(cluster.members, probes, strict=True)):
        checks = list(_checks(member, probe, here, path, jaccl, settings["distributed.sshOptions"]))
        bad += sum(not check.ok for check in checks)
        data.append({"rank": rank, "host": member["host"], "checks": [check._asdict() for check in checks]})
        lines.append(f"rank {rank}, {clean(member['host'])}")
        lines += [line for check in checks for line in _lines(check)]
    what = f"{bad} check{'s'[: bad != 1]} failed"
    failed = LaunchError("cluster_check", what, "Each has its remedy above") if bad else None
    return Result({"split": split._asdict(), "hosts": data}, lines, failed)


def _split(path: str, count: int, asked: str) -> Check:
    """What a start would decide."""
    try:
        return Check("split", True, machines.split(Path(path), count, asked)[1])
    except LaunchError as error:
        return Check("split", False, error.message, error.hint)


def _lines(check: Check) -> Iterator[str]:
    result = "ok" if check.ok else "failed"
    for number, part in enumerate(wrapped(clean(check.message), WIDTH - _RESULT - _LABEL)):
        yield f"{'' if number else f'  {result}':<{_RESULT}}{'' if number else check.name:<{_LABEL}}{part}"
    if check.hint:
        # Not broken up: it is there to be copied.
        yield f"{'':<{_RESULT}}{clean(check.hint)}"


def _probe(settings: Settings, member: machines.Member, path: str) -> dict[str, Any] | LaunchError:
    """What a machine says of itself, or why it says nothing."""
    python = sys.executable if member["here"] else settings["distributed.python"] or sys.executable
    words = [python, "-P", "-m", "mlx_launcher.host.cluster_probe", path]
    if not member["here"]:
        words = [*machines.ssh(settings), "--", member["host"], shlex.join(words)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return LaunchError("silent", f"no answer in {_PROBE_S:g} s", f"See what {member['host']} is busy with")
    except OSError as error:
        return LaunchError("ssh", f"ssh cannot be started: {error.strerror}", "Install an ssh client")
    said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 255 and not member["here"]:
        return LaunchError("ssh", said[-1], _ssh_remedy(settings, member["host"], said[-1]))
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        hint = f"Install mlx-launcher for {python} there, or name another interpreter as distributed.python"
        return LaunchError("python", said[-1], hint)
    return answer


def _ssh_remedy(settings: Settings, host: str, said: str) -> str:
    words = shlex.join([*settings["distributed.sshOptions"], host])
    if "Permission denied" in said:
        return f"ssh-copy-id {words}"
    if "Host key verification" in said:
        return f"Connect once by hand and look at the key: ssh {words}"
    return f"Turn on remote login there (an ssh server), and try: ssh {words} true"


def _checks(
    member: machines.Member,
    probe: dict[str, Any] | LaunchError,
    here: dict[str, Any],
    path: str,
    jaccl: bool,
    options: list[str],
) -> Iterator[Check]:
    if isinstance(probe, LaunchError):
        if probe.code == "python":
            yield Check("ssh", True, "reached without a question")
        yield Check("python" if probe.code == "python" else "ssh", False, probe.message, probe.hint)
        return
    yield Check("ssh", True, "this machine" if member["here"] else "reached without a question")
    yield _versions(probe["versions"], here.get("versions", {}))
    yield _model(member, probe, here, path, options)
    strange = [ip for ip in member["ips"] if ip not in probe["addresses"]]
    if strange:
        own = ", ".join(ip for ip in probe["addresses"] if not ip.startswith("127."))
        hint = f"Correct distributed.peers or the host file; it has {own or 'no address but loopback'}"
        yield Check("address", False, f"{', '.join(strange)} is not an address of this machine", hint)
    else:
        yield Check("address", True, ", ".join(member["ips"]))
    if jaccl:
        yield _jaccl(member, probe)


def _versions(there: dict[str, Any], here: dict[str, Any]) -> Check:
    other = [name for name in here if there.get(name) != here[name]]
    if not other:
        return Check("packages", True, ", ".join(f"{name} {version}" for name, version in there.items()))
    what = ", ".join(f"{name} {there.get(name) or 'missing'} (here {here[name]})" for name in other)
    wanted = " ".join(f"{name}=={here[name]}" for name in other if name != "python" and here[name])
    return Check(
        "packages", False, what, f"pip install {wanted}" if wanted else f"Install Python {here['python']} there"
    )


def _model(
    member: machines.Member, probe: dict[str, Any], here: dict[str, Any], path: str, options: list[str]
) -> Check:
    slash = path.rstrip("/") + "/"
    # Not rsync --mkpath, which macOS's does not know.
    ssh = ["ssh", *options]
    make = shlex.join([*ssh, member["host"], shlex.join(["mkdir", "-p", slash])])
    through = ["-e", shlex.join(ssh)] if options else []
    copy = f"{make} && {shlex.join(['rsync', '-a', *through, slash, member['host'] + ':' + slash])}"
    if probe["wrong"]:
        return Check("model", False, probe["wrong"], "" if member["here"] else copy)
    if probe["fingerprint"] != here.get("fingerprint"):
        return Check("model", False, f"{path} is another one than here", copy)
    return Check("model", True, f"{path}, the same as here ({probe['fingerprint']})")


def _jaccl(member: machines.Member, probe: dict[str, Any]) -> Check:
    if not probe["jaccl"]:
        hint = "It wants RDMA over Thunderbolt on macOS, see MLX's documentation; or set distributed.connection to ring"
        return Check("jaccl", False, "MLX cannot use JACCL on this machine", hint)
    if not member.get("rdma"):
        hint = "Write them into the file of distributed.hostFile (mlx.distributed_config finds them)"
        return Check("jaccl", False, "no RDMA devices are named for this machine", hint)
    return Check("jaccl", True, "available")
