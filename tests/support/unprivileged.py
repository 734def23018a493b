"""A child process that may do no more than a normal user, although the tests run as root."""

import ctypes
import os
import sys
from pathlib import Path

_PR_CAPBSET_DROP = 24


def drop_capabilities() -> None:
    """For `preexec_fn`: what is executed next has no capability, so that file modes and low ports count for root too.

    As a normal user, who has none, it does nothing. Root on anything but Linux cannot be bound: OSError.
    """
    if os.geteuid() != 0:
        return
    if sys.platform != "linux":
        raise OSError("run these tests as a normal user")
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
