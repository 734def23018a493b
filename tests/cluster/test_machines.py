"""Two network namespaces as machines, joined by a cable, with an ssh server in each; `make test-cluster` installs one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.clusters import NAMED_S, Cluster, answers, expected, missing, run, turns
from support.families import TOKENS
from support.waiting import until

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

Start = Callable[..., Cluster]
# A network of the tests' own, which exists in the namespaces alone.
FIRST, SECOND = "10.231.77.1", "10.231.77.2"
# How long the ranks of a machine that lost its leader may live: the guard's patience, and its way down.
ABANDONED_S = 30.0


class Machines:
    """The namespaces `first` and `second`; `options` are what ssh needs to go from one to the other."""

    def __init__(self, directory: Path) -> None:
        number = os.getpid()
        self.directory = directory
        self.first, self.second = f"mlxa{number}", f"mlxb{number}"
        self._cable = f"mlx{number % 10**6}"
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        for kind in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / kind))
        (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
        self.options = [
            *("-F", "/dev/null", "-i", str(directory / "user"), "-oIdentitiesOnly=yes"),
            *("-oStrictHostKeyChecking=accept-new", f"-oUserKnownHostsFile={directory / 'known'}"),
        ]

    def connect(self) -> None:
        for name, address, end in ((self.first, FIRST, "a"), (self.second, SECOND, "b")):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            if end == "a":
                run("ip", "-n", name, "link", "add", f"{self._cable}a", "type", "veth", "peer", f"{self._cable}b")
            else:
                run("ip", "-n", self.first, "link", "set", f"{self._cable}b", "netns", name)
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", f"{self._cable}{end}")
            run("ip", "-n", name, "link", "set", f"{self._cable}{end}", "up")
            self.serve_ssh(name, address)

    def serve_ssh(self, name: str, address: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and Debian's service makes it
        settings = {
            "ListenAddress": address,
            "HostKey": self.directory / "host",
            "AuthorizedKeysFile": self.directory / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PidFile": "none",
        }
        file = self.directory / f"sshd_{name}"
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        self._servers[name] = subprocess.Popen(
            ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: f"{address}:22" in run("ip", "netns", "exec", name, "ss", "-Hltn"), 10, "an ssh server")

    def cable(self, state: str, end: str = "a") -> None:
        """Pulls or plugs one end of it; the machine of the other end sees no carrier."""
        run("ip", "-n", self.first if end == "a" else self.second, "link", "set", f"{self._cable}{end}", state)

    def left(self, name: str) -> list[str]:
        """The command lines of what runs on a machine, but for its ssh servers."""
        found = []
        for pid in run("ip", "netns", "pids", name).split():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if line and "sshd" not in line:
                found.append(line)
        return found

    def kill_ssh(self, name: str) -> None:
        """The server and all that it serves: what a machine loses whose ssh server is killed with its sessions."""
        for pid in run("ip", "netns", "pids", name).split():
            if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        self._servers[name].wait(10)

    def close(self) -> None:
        for name in (self.first, self.second):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for server in self._servers.values():
            server.wait(10)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    directory = tmp_path_factory.mktemp("machines")
    directory.chmod(0o755)
    machines = Machines(directory)
    try:
        machines.connect()
        yield machines
    finally:
        machines.close()


@pytest.fixture
def pair(cluster: Start, machines: Machines, llama: Path) -> Callable[..., Cluster]:
    """Starts two ranks, one on each machine; the tests of a file find both machines whole, and leave them so."""

    def start(**block: Any) -> Cluster:
        return cluster(llama, peers(machines), machines.first, **block)

    return start


def peers(machines: Machines) -> dict[str, Any]:
    return {"peers": [{"host": SECOND}], "sshOptions": machines.options}


def test_served_restarted_stopped_and_nothing_left(pair: Start, machines: Machines, llama: Path) -> None:
    served = pair()
    status = served.ready()
    assert [(row["rank"], row["host"], row["state"]) for row in status["ranks"]] == [
        (0, "127.0.0.1", "ready"),
        (1, SECOND, "ready"),
    ]
    until(lambda: all(row["rss_bytes"] > 1e7 for row in served.status()["ranks"]), 10, "the memory of both ranks")
    assert answers(served) == expected(llama)
    assert served.there(lambda: _through_the_client(served)) == answers(served)
    assert served.command("restart").returncode == 0
    assert answers(served) == expected(llama)
    assert served.command("stop").returncode == 0
    until(lambda: not machines.left(machines.second) + machines.left(machines.first), 10, "machines without leftovers")


def _through_the_client(served: Cluster) -> list[str]:
    client: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_retries=0)
    found = []
    for turn in turns():
        stream = client.chat.completions.create(
            model="m",
            messages=turn,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
        )
        found.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    return found


def test_four_ranks_by_a_host_file(cluster: Start, machines: Machines, qwen2: Path, tmp_path: Path) -> None:
    entries = [{"ssh": address, "ips": [address]} for address in (FIRST, FIRST, SECOND, SECOND)]
    (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "envs": ["A=1"], "hosts": entries}))
    served = cluster(qwen2, {"hostFile": "hosts.json", "sshOptions": machines.options}, machines.first)
    assert [row["host"] for row in served.ready()["ranks"]] == [FIRST, FIRST, SECOND, SECOND]
    assert answers(served) == expected(qwen2)
    began = time.monotonic()
    served.rank(3).kill()
    served.named("SIGKILL of rank 3 of 4, on the other machine", "rank 3", began)
    served.ready()
    assert served.command("stop").returncode == 0
    until(lambda: not machines.left(machines.second), 10, "a machine without leftovers")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_on_the_other_machine(pair: Start, llama: Path, how: signal.Signals) -> None:
    served = pair()
    before = served.ready()
    began = time.monotonic()
    served.rank(1).send_signal(how)
    said = served.named(f"{how.name} of the rank on the other machine", f"rank 1 on {SECOND}", began)
    assert ("SIGKILL" if how == signal.SIGKILL else "froze") in said
    served.ready(after=before["server"]["pid"])
    assert answers(served) == expected(llama)


def test_the_cable_is_cut(pair: Start, machines: Machines, llama: Path) -> None:
    served = pair(restart={"maxRestarts": 1})
    served.ready()
    began = time.monotonic()
    machines.cable("down")
    try:
        served.named("the cable cut", f"rank 1 on {SECOND}", began)
        until(lambda: not machines.left(machines.second), ABANDONED_S, "the end of the rank that was cut off")
        until(lambda: served.status()["state"] == "degraded", 60, "the fallback")
        assert answers(served) == expected(llama)
    finally:
        machines.cable("up")
    assert served.command("restart").returncode == 0
    served.ready()
    assert answers(served) == expected(llama)


def test_the_ssh_server_is_killed(pair: Start, machines: Machines, llama: Path) -> None:
    served = pair(restart={"maxRestarts": 0})
    served.ready()
    began = time.monotonic()
    machines.kill_ssh(machines.second)
    try:
        served.named("the ssh server and its sessions killed", f"rank 1 on {SECOND}", began)
        until(lambda: not machines.left(machines.second), ABANDONED_S, "the end of the rank that was cut off")
        until(lambda: served.status()["state"] == "degraded", 60, "the fallback")
        assert served.command("restart", "--json").returncode != 0
        assert "ssh" in served.status()["reload"]["reason"]
    finally:
        machines.serve_ssh(machines.second, SECOND)
    assert served.command("restart").returncode == 0
    served.ready()


def test_missing_at_start(machines: Machines, llama: Path, tmp_path: Path) -> None:
    served = Cluster(tmp_path, llama, peers(machines), machines.first, fallback=None, restart={"maxRestarts": 0})
    machines.cable("down", "b")
    try:
        began = time.monotonic()
        assert served.command("start", "--no-wait", "--port", str(served.port)).returncode == 0
        until(lambda: f"rank 1 on {SECOND}" in json.dumps(served.last()), NAMED_S, "the name of what is missing")
        served.note("a machine missing at start", began)
    finally:
        machines.cable("up", "b")
        served.clean_up()


def test_the_ranks_cannot_reach_each_other(machines: Machines, llama: Path, tmp_path: Path) -> None:
    """ssh goes through, MLX's own connections do not: what a firewall does."""
    served = Cluster(
        tmp_path, llama, {**peers(machines), "port": 20000}, machines.first, fallback=None, restart={"maxRestarts": 0}
    )
    route = ["ip", "-n", machines.second, "rule", "add", "ipproto", "tcp", "dport", "20000", "prohibit"]
    run(*route)
    try:
        assert served.command("start", "--no-wait", "--port", str(served.port)).returncode == 0
        began = time.monotonic()
        until(
            lambda: "no connection to the other ranks" in json.dumps(served.last()), 30, "the name of what is missing"
        )
        served.note("MLX's ports blocked, from the first import on", began)
    finally:
        run(*["del" if word == "add" else word for word in route])
        served.clean_up()
    until(lambda: not machines.left(machines.second), ABANDONED_S, "a machine without leftovers")


def test_check(pair: Start, machines: Machines, llama: Path, tmp_path: Path) -> None:
    asked = Cluster(tmp_path, llama, peers(machines), machines.first)
    done = asked.command("cluster", "check", "--json")
    checks = json.loads(done.stdout)["data"]["hosts"][1]["checks"]
    assert (done.returncode, [check["name"] for check in checks]) == (0, ["ssh", "packages", "model", "address"])
    for options, name, remedy in (
        (
            {"sshOptions": [*machines.options[:2], "-oStrictHostKeyChecking=no", "-oIdentityFile=none"]},
            "ssh",
            "ssh-copy-id",
        ),
        ({"python": "/nowhere/python"}, "python", "Install mlx-launcher"),
        ({"connection": "ring", "python": "/usr/bin/env false"}, "python", "Install"),
    ):
        asked = Cluster(tmp_path, llama, {**peers(machines), **options}, machines.first)
        done = asked.command("cluster", "check", "--json")
        failed = [c for c in json.loads(done.stdout)["data"]["hosts"][1]["checks"] if not c["ok"]]
        assert (done.returncode, failed[0]["name"]) == (1, name), failed
        assert remedy in failed[0]["hint"]
