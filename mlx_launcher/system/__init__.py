"""What differs between macOS and Linux: processes, their memory, who holds a port.

Linux is read from /proc. macOS needs psutil, which costs 1.5 MiB and is therefore imported inside the functions that use it.
"""

# No pathlib: it costs 1 MiB in a process that lives for weeks.
# ruff: noqa: PTH123, PTH208

import os
import socket
import sys
from typing import Any, TypedDict

_CMDLINE_CHARS = 200
# macOS's <sys/un.h>; the socket module does not name them.
_SOL_LOCAL = 0
_LOCAL_PEERCRED = 1


class Holder(TypedDict):
    """Who listens on a port. `pid` is None where the system does not tell (another user's socket)."""

    pid: int | None
    name: str
    cmdline: str  # one line, cut after 200 characters


def _linux_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, beginning with the state; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return None


def rss_bytes(pid: int) -> int | None:
    """Resident memory of a process in bytes; None when it is gone or the system does not tell.

    On macOS the caller's own is the peak (`getrusage`), because the present value is not worth importing psutil for.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return None
    if pid == os.getpid():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def process_started(pid: int) -> float | None:
    """When a process began, in seconds; None when there is none, or only a zombie.

    Only for comparing with another value of this function on the same machine, in whatever process: the wall clock may be set
    between two readings. On Linux it counts from boot; on macOS it is what the kernel noted when the process began.
    """
    if sys.platform == "linux":
        fields = _linux_stat(pid)
        if fields is None or fields[0] in "ZX":
            return None
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    import psutil

    try:
        process: Any = psutil.Process(pid)
        # Not create_time(): that is corrected by how far the clock was set since this process imported psutil.
        began: float | None = process._ident[1]
        return None if process.status() == psutil.STATUS_ZOMBIE else began
    except psutil.Error:
        return None


def process_alive(pid: int, started: float | None) -> bool:
    """Whether that very process runs: the same pid and the same start time, so that a reused pid is a stranger."""
    return started is not None and process_started(pid) == started


def group_left(pgid: int) -> bool:
    """Whether anything of a process group still runs. Zombies do not count: they hold nothing, and may stay for long."""
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        return False
    if sys.platform != "linux":
        return True
    for name in os.listdir("/proc"):
        fields = _linux_stat(int(name)) if name.isdigit() else None
        if fields and int(fields[2]) == pgid and fields[0] not in "ZX":
            return True
    return False


def group_cpu_s(pgid: int) -> float | None:
    """Processor time that the processes of a group have used, in seconds, with that of their children that have ended.

    Only for comparing with another value of this function. None where nothing is known of any of them.
    """
    if sys.platform == "linux":
        found = [fields for name in os.listdir("/proc") if name.isdigit() and (fields := _linux_stat(int(name)))]
        ours = [sum(map(int, fields[11:15])) for fields in found if int(fields[2]) == pgid]
        return sum(ours) / os.sysconf("SC_CLK_TCK") if ours else None
    import psutil

    used: list[float] = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid:
                used.append(sum(process.cpu_times()))
        except (OSError, psutil.Error):
            continue
    return sum(used) if used else None


def peer_uid(sock: socket.socket) -> int | None:
    """The user at the other end of a connected Unix socket, as the kernel noted it; None where the system does not tell."""
    try:
        if sys.platform == "linux":  # struct ucred: pid, uid, gid
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        # struct xucred: version, uid, the number of groups, 16 groups
        return int.from_bytes(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)[4:8], sys.byteorder)
    except OSError:
        return None


def service_exit_code(code: int) -> int:
    """With what a service ends where another try would end the same: systemd can be told of codes, launchd knows none but 0."""
    return 0 if sys.platform == "darwin" else code


def port_holders(port: int) -> list[Holder]:
    """The processes that listen on a TCP port, as far as the system tells; empty when nobody does or nothing is known."""
    import psutil

    pids: list[int | None] = []
    try:
        pids += [c.pid for c in psutil.net_connections("tcp") if _listens(c, port)]
    except psutil.AccessDenied:  # macOS tells only root; everybody may ask about their own processes one by one
        for process in psutil.process_iter():
            try:
                if any(_listens(c, port) for c in process.net_connections("tcp")):
                    pids.append(process.pid)
            except psutil.Error:
                continue
    return [_holder(pid) for pid in dict.fromkeys(pids)]


def _listens(connection: Any, port: int) -> bool:
    return bool(connection.status == "LISTEN" and connection.laddr and connection.laddr.port == port)


def _holder(pid: int | None) -> Holder:
    import psutil

    if pid is None:
        return {"pid": None, "name": "a program of another user", "cmdline": ""}
    name = cmdline = ""
    try:
        process = psutil.Process(pid)
        name = process.name()
        words = " ".join(process.cmdline()).split()  # what it was started with may hold line breaks
        cmdline = " ".join(words)[:_CMDLINE_CHARS]
    except psutil.Error:
        pass
    return {"pid": pid, "name": name, "cmdline": cmdline}
