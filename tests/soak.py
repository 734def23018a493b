"""Random faults under load: `make soak MINUTES=10`.

The product as a user runs it, the random-weight model, four clients that know every right answer. Half of the time with a restart
budget that no number of kills spends, then with the default one, where the kills have to end in a rollback. Prints what
clients saw and what was left; exits 1 if anybody was refused, got a wrong answer, or anything was left over.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support.launched import Launcher, http_request, stream_events
from support.waiting import until

from mlx_launcher.demo import build_random

CLIENTS = 4
PROMPTS = [f"{word} " * length for length in (2, 12, 30, 60) for word in ("stone", "river", "cloud")]


def body(prompt: str, stream: bool = False) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0, "stream": stream}


class Load:
    """Clients that ask without a pause and compare each answer with the right one."""

    def __init__(self, port: int, right: dict[str, str]) -> None:
        self.seen: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._port = port
        self._right = right
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(seed,), daemon=True) for seed in range(CLIENTS)]

    def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over.is_set():
            outcome, detail = self._ask(chance.choice(PROMPTS), chance.random() < 0.5)
            self.seen[outcome] += 1
            self.examples.setdefault(outcome, detail)

    def _ask(self, prompt: str, stream: bool) -> tuple[str, str]:
        try:
            reply = http_request(self._port, "/v1/chat/completions", body(prompt, stream), timeout_s=120)
            if reply.status != 200:
                return ("told to come back" if reply.status in (429, 503) else "failed"), reply.body.decode()[:200]
            text = _streamed(reply.body) if stream else reply.text
        except ConnectionRefusedError as error:
            return "refused", repr(error)
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
            return "reset", repr(error)
        if text is None:
            return "reset", "an error event ended the stream"
        return ("answered", "") if text == self._right[prompt] else ("wrong", f"{text!r} for {prompt!r}")

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(150)
            self.seen["hanging"] += thread.is_alive()


def _streamed(raw: bytes) -> str | None:
    events = list(stream_events(raw))
    if events[-1] != "[DONE]":
        return None
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])


class Faults:
    """What is done to a running launcher; each returns after the deed."""

    def __init__(self, launcher: Launcher, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._launcher = launcher
        self._chance = random.Random(seed)
        self._instance = launcher.state_dir / str(launcher.port)

    def one(self, kinds: list[str]) -> None:
        kind = self._chance.choice(kinds)
        action: Callable[[], None] = getattr(self, kind)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ConnectionError):
            action()
            self.done[kind] += 1

    def _signal(self, number: int) -> None:
        if pid := self._launcher.server_pid():
            os.kill(pid, number)

    def kill_server(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate_server(self) -> None:
        self._signal(signal.SIGTERM)

    def pause_server(self) -> None:
        if pid := self._launcher.server_pid():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.2, 1.5))
            os.kill(pid, signal.SIGCONT)

    def tear_entry(self) -> None:
        entries = list((self._instance.parent / "kvcache").glob("*/*.safetensors"))
        if entries:
            os.truncate(self._chance.choice(entries), 1000)

    def delete_log(self) -> None:
        (self._instance / "server.log").unlink()

    def leave_in_the_middle(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._launcher.port, timeout=5)
        connection.request("POST", "/v1/chat/completions", json.dumps({**body("leave " * 200), "max_tokens": 500}))
        time.sleep(0.1)
        connection.close()

    def babble_at_the_control_socket(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            here = Path.cwd()
            os.chdir(self._instance)
            try:
                sock.connect("control.sock")
            finally:
                os.chdir(here)
            sock.sendall(b"\xff\0 nonsense\n" * 100)

    def hang_up(self) -> None:
        os.kill(self._launcher.status()["supervisor"]["pid"], signal.SIGHUP)

    def restart(self) -> None:
        self._launcher.command("restart", timeout_s=120)


GENTLE = [
    "pause_server",
    "tear_entry",
    "delete_log",
    "leave_in_the_middle",
    "babble_at_the_control_socket",
    "hang_up",
    "restart",
]
DEADLY = ["kill_server", "terminate_server"]


def phase(
    title: str, model: Path, right: dict[str, str], minutes: float, seed: int, restart: dict[str, Any] | None
) -> bool:
    """One launcher, faults for `minutes`, then a stop; whether everything held. Where it did not, its directory is kept."""
    print(f"\n{title}: {minutes:g} min, seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="mlx-launch-soak-"))
    launcher = Launcher(directory / "state")
    try:
        start(launcher, directory / ".anyclauderc.json", model, restart)
        held = endured(launcher, right, minutes, Faults(launcher, seed), seed, generous=restart is not None)
    finally:
        launcher.clean_up()
    if held:
        shutil.rmtree(directory)
    else:
        print(f"  kept      {directory}")
    return held


def start(launcher: Launcher, config: Path, model: Path, restart: dict[str, Any] | None) -> None:
    block = {
        "model": str(model),
        "modelPath": str(model),
        "port": launcher.port,
        **({"restart": restart} if restart else {}),
    }
    config.write_text(json.dumps({"backend": "mlx", "backends": {"mlx": block}}))
    done = launcher.command("--config", str(config), "start", timeout_s=120)
    if done.returncode:
        raise SystemExit(done.stderr)


def endured(
    launcher: Launcher, right: dict[str, str], minutes: float, faults: Faults, seed: int, generous: bool
) -> bool:
    """Whether nobody was refused or told wrong, nothing was left, and a rollback came where the budget was not `generous`."""
    supervisor = psutil.Process(launcher.status()["supervisor"]["pid"])
    before = supervisor.num_fds(), supervisor.num_threads(), supervisor.memory_info().rss
    with Load(launcher.port, right) as load:
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            faults.one([*DEADLY, *GENTLE] if generous else DEADLY)
            time.sleep(random.Random(seed + faults.done.total()).uniform(1, 4))
            if not generous and launcher.status()["state"] == "degraded":
                break
        served = load.seen["answered"]
        until(lambda: load.seen["answered"] > served + 10, 120, "answers after the last fault")
    status = launcher.status()
    after = supervisor.num_fds(), supervisor.num_threads(), supervisor.memory_info().rss
    journal = (launcher.state_dir / str(launcher.port) / "journal.jsonl").read_text().splitlines()
    exits = [event for line in journal if (event := json.loads(line))["event"] == "exit"]
    launcher.command("stop", timeout_s=120)
    left = [process.cmdline() for process in launcher.processes()]
    print(f"  clients   {dict(load.seen)}")
    print(f"  faults    {dict(faults.done)}")
    reasons = all(event.get("reason") for event in exits)
    print(f"  server    {len(exits)} ends, each with a reason: {reasons}; state {status['state']}")
    torn = len(list(launcher.state_dir.rglob("torn/*")))
    print(f"  left over {len(left)} processes; KV cache entries set aside: {torn}")
    print(f"  supervisor fds {before[0]} -> {after[0]}, threads {before[1]} -> {after[1]}, "
          f"memory {before[2] / 2**20:.1f} -> {after[2] / 2**20:.1f} MiB")  # fmt: skip
    bad = [outcome for outcome in ("refused", "wrong", "failed", "hanging") if load.seen[outcome]]
    for outcome in bad:
        print(f"  {outcome}: {load.examples.get(outcome)}")
    return not bad and not left and reasons and (status["rollback"] is None) == generous


def right_answers(model: Path, directory: Path) -> dict[str, str]:
    """What the model says to each prompt while nothing disturbs it."""
    calm = Launcher(directory / "calm")
    try:
        calm.start("--model", str(model))
        return {prompt: http_request(calm.port, "/v1/chat/completions", body(prompt)).text for prompt in PROMPTS}
    finally:
        calm.clean_up()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    generous = {"maxRestarts": 100_000, "window": "5m", "backoff": "100ms", "backoffMax": "1s"}
    with tempfile.TemporaryDirectory(prefix="mlx-launch-soak-") as directory:
        model = build_random(Path(directory) / "random")
        right = right_answers(model, Path(directory))
        held = phase("a budget that is never spent", model, right, arguments.minutes * 0.8, arguments.seed, generous)
        held &= phase("the default budget", model, right, max(1.0, arguments.minutes * 0.2), arguments.seed + 1, None)
    print("\nheld" if held else "\nDID NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
