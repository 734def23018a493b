"""What systemd is told of a service of `Type=notify`: datagrams to the socket that it names (sd_notify(3))."""

import os
import socket
import time
from collections.abc import Mapping, MutableMapping

# They are meant for one process; whoever inherits them would speak in its name.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# How long a stop may take from each time that it says it goes on, and how often it says so.
EXTEND_S = 20.0
EXTEND_EVERY_S = 5.0
_STATUS_CHARS = 200


def take(mine: MutableMapping[str, str], *others: MutableMapping[str, str]) -> dict[str, str]:
    """Takes the variables out of all these environments; what they said in the first."""
    for environment in others:
        for name in VARIABLES:
            environment.pop(name, None)
    return {name: mine.pop(name) for name in VARIABLES if name in mine}


class Notify:
    """What it is told is in `variables`; without NOTIFY_SOCKET every call does nothing. Raises nothing, and never waits."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        address, usec, pid = (variables.get(name, "") for name in VARIABLES)
        self._sock: socket.socket | None = None
        self._every_s: float | None = None
        self._next = 0.0
        self._status = ""
        self._stopping = False
        if not address.startswith(("/", "@")):
            return
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        if usec.isdecimal() and int(usec) and pid in ("", str(os.getpid())):
            self._every_s = int(usec) / 2e6

    def ready(self) -> None:
        """It does what it is there for: the port is bound. After `reloading`: it goes on."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """The state in one line, told when it is another one than before."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={' '.join(text.split())[:_STATUS_CHARS]}")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """From here on the manager waits for the end, and is asked for more time as long as there are turns."""
        if not self._stopping:
            self._stopping, self._next = True, 0.0
            self._send("STOPPING=1")

    def turned(self) -> None:
        """To be called by the loop on every turn, and by nothing else: it is what proves that the loop turns."""
        now = time.monotonic()
        if now < self._next:
            return
        lines: list[str] = []
        waits: list[float] = []
        if self._every_s is not None:
            lines.append("WATCHDOG=1")
            waits.append(self._every_s)
        if self._stopping:
            lines.append(f"EXTEND_TIMEOUT_USEC={int(EXTEND_S * 1e6)}")
            waits.append(EXTEND_EVERY_S)
        if lines:
            self._next = now + min(waits)
            self._send("\n".join(lines))

    def _send(self, text: str) -> None:
        if self._sock is not None:
            try:
                self._sock.sendto(text.encode("utf-8", "replace"), self._address)
            except OSError:  # a manager that is being restarted, or that does not read: the next one counts
                return
