"""Several machines as one: which they are, how a model is split among them, and what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.backends.cluster import split
from mlx_launcher.cli import main
from mlx_launcher.cli.screen import WIDTH, columns
from mlx_launcher.config.document import read
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.host.cluster_ring import memberships
from mlx_launcher.host.reports import versions
from mlx_launcher.plan import Plan, compared

HERE = {"ssh": "here", "ips": ["127.0.0.1"]}
# Addresses that nobody has (RFC 5737); nothing is sent to them.
AWAY = {"ssh": "away", "ips": ["192.0.2.7"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "llama")


def plan_of(directory: Path, model: Path, name: str = "mlx-cluster", **block: Any) -> Plan:
    file = directory / ".anyclauderc.json"
    file.write_text(json.dumps({"backend": name, "backends": {name: {"modelPath": str(model), **block}}}))
    return assemble(Flags(), directory / "state", Caller([], str(directory), {}), read(file))


def cluster_of(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = plan["backend"]["settings"]["cluster"]
    return found


def test_peers_and_this_machine(tmp_path: Path, model: Path) -> None:
    plan = plan_of(
        tmp_path, model, "mlx", distributed={"enabled": True, "peers": [{"host": "127.0.0.1", "memory_gb": 8}]}
    )
    assert (plan["backend"]["name"], plan["backend"]["kind"], plan["backend"]["argv"][-1]) == ("mlx", "host", "cluster")
    assert cluster_of(plan)["hosts"] == [{"host": "127.0.0.1", "ips": ["127.0.0.1"], "here": True}] * 2
    assert (cluster_of(plan)["strategy"], cluster_of(plan)["link"]) == ("tensor", "ring")
    assert any("tensor" in note for note in plan["notes"])
    assert plan["fallback"] is not None
    assert plan["fallback"]["name"] == "mlx-legacy"


def test_anyclaudes_nodes_are_machines(tmp_path: Path, model: Path) -> None:
    nodes = [{"id": "a", "url": "http://127.0.0.1:8081"}, {"id": "b", "url": "http://127.0.0.1:8082"}]
    plan = plan_of(tmp_path, model, discovery={"mode": "static", "nodes": nodes[:1]})
    assert [host["host"] for host in cluster_of(plan)["hosts"]] == ["127.0.0.1", "127.0.0.1"]


def test_a_node_whose_url_is_none_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(LaunchError, match="has no name"):
        plan_of(tmp_path, model, discovery={"nodes": [{"url": "http://[x"}]})


def test_a_host_file_of_mlx(tmp_path: Path, model: Path) -> None:
    (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "envs": ["A=1"], "hosts": [HERE, AWAY]}))
    block = {"hostFile": "hosts.json", "sshOptions": ["-p", "2222"], "python": "/opt/python", "port": 7000}
    plan = plan_of(tmp_path, model, distributed=block, env={"SECRET": "hidden"})
    cluster = cluster_of(plan)
    assert [(host["host"], host["here"]) for host in cluster["hosts"]] == [("here", True), ("away", False)]
    assert (cluster["ssh"][:3], cluster["python"]) == (["ssh", "-p", "2222"], "/opt/python")
    assert plan["backend"]["env"]["A"] == "1"
    assert {"A", "SECRET"} <= set(cluster["env"])
    # `status` shows what is compared.
    assert "hidden" not in json.dumps(compared(plan))
    first, second = memberships(cluster)
    assert (first["rank"], second["rank"], second["size"]) == (0, 1, 2)
    assert json.loads(second["files"]["MLX_HOSTFILE"]) == [["127.0.0.1:7000"], ["192.0.2.7:7001"]]


def test_jaccl_where_the_host_file_has_its_devices(tmp_path: Path, model: Path) -> None:
    hosts = [{**HERE, "rdma": [None, "rdma_en2"]}, {**AWAY, "rdma": ["rdma_en2", None]}]
    (tmp_path / "hosts.json").write_text(json.dumps({"backend": "jaccl", "hosts": hosts}))
    cluster = cluster_of(plan_of(tmp_path, model, distributed={"hostFile": "hosts.json"}))
    assert cluster["link"] == "jaccl"
    (first, _) = memberships(cluster)
    assert first["environment"]["MLX_JACCL_COORDINATOR"] == "127.0.0.1:32323"
    assert json.loads(first["files"]["MLX_IBV_DEVICES"]) == [[None, "rdma_en2"], ["rdma_en2", None]]
    (tmp_path / "hosts.json").write_text(json.dumps([HERE, AWAY]))
    assert cluster_of(plan_of(tmp_path, model, distributed={"hostFile": "hosts.json"}))["link"] == "ring"


@pytest.mark.parametrize(
    ("distributed", "hosts", "said"),
    [
        ({}, None, "of this machine alone"),
        ({"peers": [{}]}, None, "has no name"),
        ({"peers": [{"host": "no.such.host.invalid"}]}, None, "no IPv4 address is known"),
        ({"hostFile": "hosts.json"}, None, "cannot be read"),
        ({"hostFile": "hosts.json"}, "{", "no host file of MLX"),
        ({"hostFile": "hosts.json"}, [{"ssh": "a", "ips": []}], "no host file of MLX"),
        ({"hostFile": "hosts.json"}, [{"ssh": "a", "ips": ["name"]}], "no host file of MLX"),
        ({"hostFile": "hosts.json"}, [AWAY, HERE], "is not this one"),
        ({"hostFile": "hosts.json", "connection": "jaccl"}, [HERE, AWAY], "RDMA devices"),
        ({"hostFile": "hosts.json"}, [HERE, {**AWAY, "rdma": 5}], "no host file of MLX"),
        ({"peers": [{"host": "127.0.0.1"}], "strategy": "both"}, None, "strategy"),
        ({"peers": [{"host": "127.0.0.1"}] * 2}, None, "cannot be split among 3"),
    ],
)
def test_what_is_refused(distributed: dict[str, Any], hosts: Any, said: str, tmp_path: Path, model: Path) -> None:
    if hosts is not None:
        (tmp_path / "hosts.json").write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    with pytest.raises(LaunchError) as caught:
        plan_of(tmp_path, model, distributed=distributed)
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "count", "asked", "strategy"),
    [
        ("llama", 2, "auto", "tensor"),
        ("llama", 4, "auto", None),  # two heads of keys and values, and no pipeline
        ("llama", 2, "pipeline", None),
        ("qwen2", 2, "auto", "tensor"),
        ("qwen2", 4, "auto", "pipeline"),
        ("qwen2", 2, "Pipeline", "pipeline"),
        ("qwen2", 5, "auto", None),
        ("qwen3_next", 2, "auto", "pipeline"),
        ("gpt_oss", 2, "auto", "tensor"),
        ("gemma3_text", 2, "auto", None),
    ],
)
def test_how_a_model_is_split(family: str, count: int, asked: str, strategy: str | None, tmp_path: Path) -> None:
    path = build_random(tmp_path / family, family)
    if strategy is None:
        with pytest.raises(LaunchError) as caught:
            split(path, count, asked)
        assert caught.value.code == "cluster_split"
    else:
        found, why = split(path, count, asked)
        assert found == strategy
        assert why.startswith(f"{family} on {count} machines: ")


# -- the check


def checked(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(directory / ".anyclauderc.json"), "--state-dir", str(directory / "state"), *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("peers", "distributed", "said"),
    [
        (1, {}, None),
        (2, {}, "its 4 attention heads cannot be divided by 3"),
        (1, {"strategy": "pipeline"}, "mlx-lm has no pipeline for this architecture"),
    ],
)
def test_what_start_refuses_the_check_refuses(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    peers: int,
    distributed: dict[str, Any],
    said: str | None,
) -> None:
    block = {"modelPath": str(model), "distributed": {"peers": [{"host": "127.0.0.1"}] * peers, **distributed}}
    (tmp_path / ".anyclauderc.json").write_text(
        json.dumps({"backend": "mlx-cluster", "backends": {"mlx-cluster": block}})
    )
    code, out = checked(tmp_path, capsys, "--json", "cluster", "check")
    found = json.loads(out)["data"]["split"]
    planned, plan = checked(tmp_path, capsys, "--json", "plan")
    assert (code, planned, found["ok"]) == ((0, 0, True) if said is None else (1, 1, False))
    if said is None:
        assert found["message"] in json.loads(plan)["data"]["notes"]
    else:
        assert said in found["message"]
        assert found["message"] == json.loads(plan)["errors"][0]["message"]
        assert found["hint"]


def test_the_check_fits_the_screen_and_its_remedies_can_be_copied(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.json").write_text(json.dumps([HERE, AWAY]))
    given = {"hostFile": "hosts.json", "sshOptions": ["-p", "2222"]}
    block = {"modelPath": str(model), "distributed": given}
    (tmp_path / ".anyclauderc.json").write_text(
        json.dumps({"backend": "mlx-cluster", "backends": {"mlx-cluster": block}})
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for says, remedy in (
        ("echo 'away: Permission denied (publickey).' >&2; exit 255", "ssh-copy-id -p 2222 away"),
        ("echo 'Host key verification failed.' >&2; exit 255", "look at the key: ssh -p 2222 away"),
        ("echo 'Connection refused' >&2; exit 255", "try: ssh -p 2222 away true"),
        (probe(), f"rsync -a -e 'ssh -p 2222' {model}/ away:{model}/"),
    ):
        (tmp_path / "ssh").write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "ssh").chmod(0o755)
        code, out = checked(tmp_path, capsys, "cluster", "check")
        hints = [line for line in out.splitlines() if line.startswith(" " * 10) and remedy in line]
        assert (code, len(hints)) == (1, 1), out
        assert all(columns(line) <= WIDTH for line in out.splitlines() if line not in hints), out


def probe() -> str:
    """The answer of a machine with another model."""
    answer = {"versions": versions(), "fingerprint": "another", "wrong": None, "addresses": AWAY["ips"], "jaccl": False}
    return f"echo '{json.dumps(answer)}'"
