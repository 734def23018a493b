"""The README's pictures, made from what the program really writes: `make pictures`.

Runs the commands on a terminal of 80 columns, in a home of their own, and draws the last state of the screen as an SVG; and has
`bench` draw what it measures, of a random model, which wants a machine that does nothing else for some minutes. Exits 1 where
a command fails, or port 8081, which the pictures show, is taken.
"""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from support.launched import ROOT, chat, processes_naming
from support.waiting import until

from mlx_launcher.demo import build_random

PICTURES = ROOT / "docs" / "pictures"
COLUMNS, ROWS, PORT = 80, 24, 8081
PROGRAM = Path(sys.executable).with_name("mlx-launch")
# Long enough for a few answers to be counted.
WATCHED_S = 6.0
# What was asked is written to the disk while nobody asks.
PAUSE_S, ENTRIES = 0.1, 3
TURNS = 5
# A page on the web would fetch rich's font from elsewhere.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
# What puts the cursor back to where a screen that is drawn again begins, and what else is no text or colour.
_AGAIN = re.compile(r"\x1b\[(?:\d*;?\d*)?H|\x1b\[\d*[AF]")
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]")
_LEFT = "\x1b[?1049l"


def main() -> int:
    with socket.socket() as sock:
        if not sock.connect_ex(("127.0.0.1", PORT)):
            print(f"port {PORT} is taken: mlx-launch stop", file=sys.stderr)
            return 1
    PICTURES.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="p"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "ANYCLAUDE"))}
    environment |= {
        "HOME": str(home),
        "TERM": "xterm-256color",
        "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        draw("start", "mlx-launch start --demo", home, environment)
        with asking():
            until(lambda: entries(environment) >= ENTRIES, 60, f"{ENTRIES} entries in the KV cache")
            draw("status", "mlx-launch status", home, environment)
            if "--watch" in on_a_terminal("mlx-launch status --help", environment):
                draw("watch", "mlx-launch status --watch", home, environment, WATCHED_S)
        on_a_terminal("mlx-launch stop", environment)
        measured(build_random(home / "random-11MB"), environment)
    finally:
        for process in processes_naming(str(home)):
            process.kill()
        subprocess.run(["rm", "-rf", str(home)], check=True)
    return 0


def draw(name: str, command: str, home: Path, environment: dict[str, str], seconds: float | None = None) -> None:
    """docs/pictures/NAME.svg. With `seconds` a command is ended after that, and its last whole screen is shown."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    said = on_a_terminal(command, environment, seconds)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(screen(said).replace(str(home), "~")), end="")
    svg = console.export_svg(title="", code_format=FORMAT, unique_id=f"picture-{name}")
    file = PICTURES / f"{name}.svg"
    file.write_text("\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


def measured(model: Path, environment: dict[str, str]) -> None:
    """docs/pictures/bench.png."""
    options = ["--model", str(model), "--backends", "mlx,mlx-legacy", "--turns", str(TURNS)]
    file = PICTURES / "bench.png"
    subprocess.run([PROGRAM, "bench", *options, "--plot", file], env=environment, check=True)
    print(f"written: {file.relative_to(ROOT)}")


def on_a_terminal(command: str, environment: dict[str, str], seconds: float | None = None) -> str:
    """All that a command writes to a terminal of its own. SystemExit where it fails."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command.split(), env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    end, said = time.monotonic() + (seconds or 120), b""
    while time.monotonic() < end:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            said += os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            break
    if seconds:
        process.send_signal(signal.SIGINT)
    code = process.wait(30)
    os.close(ours)
    if code:
        raise SystemExit(f"{command} ended with {code}: {said.decode()}")
    return said.decode()


def screen(said: str) -> str:
    """What is on the terminal in the end: lines that were written over are gone, and of screens the last whole one is there."""
    frames = _AGAIN.split(said.partition(_LEFT)[0])
    last = frames[-2] if len(frames) > 2 else frames[-1]
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in last.split("\n"))
    return _MOVES.sub("", "\n".join(lines)).strip("\n") + "\n"


def entries(environment: dict[str, str]) -> int:
    """How many the KV cache has."""
    said = subprocess.run([PROGRAM, "status", "--json"], env=environment, capture_output=True, check=True).stdout
    return json.loads(said)["data"]["kv_cache"]["entries"] or 0


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Somebody talks to the server meanwhile: of each story three times, and then of another one."""
    over = threading.Event()

    def ask() -> None:
        story = "Tell me again about the river, the stone and the cloud. " * 30
        turn = 0
        while not over.wait(PAUSE_S):
            with contextlib.suppress(OSError):
                chat(PORT, f"Story {turn // 3}. {story}", max_tokens=60)
            turn += 1

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


if __name__ == "__main__":
    sys.exit(main())
