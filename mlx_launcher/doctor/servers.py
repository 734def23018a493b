"""What runs, what gave up, what a killed supervisor left, and whether the KV cache is of any use to the clients."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlx_launcher import system
from mlx_launcher.config.defaults import PREFILL_BATCH
from mlx_launcher.config.document import FILE_VARIABLE
from mlx_launcher.doctor.check import Check, Instance, Subject
from mlx_launcher.doctor.state import cache_directory
from mlx_launcher.errors import LaunchError
from mlx_launcher.kvcache.files import TEMPORARY, folders, unfinished

# Fewer requests, or shorter ones, may well have had nothing in common.
_REQUESTS = 5
_LONG = PREFILL_BATCH
_STATE_FILES = ("state.json", "control.sock", ".state.json.new")
# States with which a supervisor ends by itself.
_ENDED = ("stopped", "failed")


def servers(subject: Subject) -> Iterator[Check]:
    """One finding for each server that runs, and one for each that gave up."""
    found = [check for instance in subject.instances if (check := _server(subject, instance))]
    yield from found or [Check("server", "skipped", "nothing is running")]


def _server(subject: Subject, instance: Instance) -> Check | None:
    port, status = instance.port, instance.status
    state, reason = status.get("state"), status.get("last_error")
    if not instance.running:
        if state != "failed":
            return None
        again, file = subject.typed("start", port), status.get("config")
        if file and subject.file != Path(file):
            again = f"{FILE_VARIABLE}={shlex.quote(file)} {again}"
        return Check("server", "warning", f"port {port} gave up: {reason}", again)
    if instance.trouble is not None:
        pid = instance.state.get("pid")
        stopped = isinstance(pid, int) and _is_stopped(pid)
        mend = f"kill -CONT {pid}" if stopped else f"kill -KILL {pid}" if pid else None
        return Check("server", "failed", f"port {port}: {'it is stopped' if stopped else instance.trouble}", mend)
    if state == "degraded":
        why = (status.get("rollback") or {}).get("reason")
        what = f"port {port} is on {status['backend']} instead of {status['configured_backend']}: {why}"
        return Check("server", "warning", what, subject.typed("restart", port))
    return Check("server", "ok", f"{state} at {status.get('url')}")


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by Ctrl-Z."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def cache_hits(subject: Subject) -> Iterator[Check]:
    """The billing header that Claude Code begins its prompts with makes each one new to a prefix cache."""
    asked = [instance for instance in subject.instances if instance.running and instance.status.get("activity")]
    for instance in asked:
        did, port = instance.status["activity"], instance.port
        requests, read, cached = did["requests"], did["prompt_tokens"], did["cached_tokens"]
        enabled = instance.status.get("settings", {}).get("cache", {}).get("enabled", True)
        what = f"port {port}: {cached:,} of {read:,} tokens from the cache in {requests:,} requests"
        if enabled and not cached and requests >= _REQUESTS and read >= _LONG * requests:
            why = "as it is when Claude Code begins each prompt with its billing header: set this where it is started"
            yield Check("cache hits", "warning", f"{what}, {why}", "export CLAUDE_CODE_ATTRIBUTION_HEADER=0")
        else:
            yield Check("cache hits", "ok", what)
    if not asked:
        yield Check("cache hits", "skipped", "nothing is running")


def leftovers(subject: Subject) -> Iterator[Check]:
    """What a killed supervisor or server left behind. The next start clears it away; until then it may be in the way."""
    found = [check for instance in subject.instances if not instance.running for check in _of_instance(instance)]
    found += _half_written(subject)
    yield from found or [Check("leftovers", "ok", "none")]


def _of_instance(instance: Instance) -> Iterator[Check]:
    files = [path for name in _STATE_FILES if os.path.lexists(path := instance.path / name)]
    clear = f"rm -f {shlex.join(map(str, files))}"
    server, port = instance.state.get("server"), instance.port
    if isinstance(server, dict) and isinstance(server.get("pid"), int):
        pid = server["pid"]
        if system.process_alive(pid, server.get("started")):
            what = f"port {port}: its supervisor was killed, and its server (pid {pid}) still runs"
            yield Check("leftovers", "failed", what, f"kill -- -{pid}; {clear}")
            return
    torn = not instance.state and (instance.path / "state.json").exists()
    if torn:
        yield Check("leftovers", "warning", f"port {port}: its state file cannot be read", clear)
    elif instance.state and instance.status.get("state") not in _ENDED:
        what = f"port {port}: its supervisor (pid {instance.state.get('pid')}) was killed, and nothing of it runs"
        yield Check("leftovers", "warning", what, clear)
    elif [path for path in files if path.name != "state.json"]:
        rest = [path for path in files if path.name != "state.json"]
        yield Check("leftovers", "warning", f"{rest[0]} belongs to nobody", f"rm -f {shlex.join(map(str, rest))}")


def _half_written(subject: Subject) -> list[Check]:
    """KV cache entries whose writer was killed."""
    directories, settings = {subject.state_dir / "kvcache"}, subject.settings
    if not isinstance(settings, LaunchError):
        directories.add(cache_directory(subject, settings))
    found = (file for root in sorted(directories) for directory in folders(root) for file in unfinished(directory))
    files = [file for file in found if _is_orphan(file)]
    if not files:
        return []
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    what = f"{files[0]}{more}: half written by a process that was killed"
    return [Check("leftovers", "warning", what, f"rm -f {shlex.join(map(str, files))}")]


def _is_orphan(file: Path) -> bool:
    """Whether the process that writes it, whose pid is in its name, is gone."""
    pid = file.name.removeprefix(f"{TEMPORARY}-").partition("-")[0]
    return not pid.isdecimal() or system.process_started(int(pid)) is None
