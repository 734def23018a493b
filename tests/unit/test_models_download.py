"""A real download by the hub's own client, from a hub of the test's own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.hub import COMMIT, Hub, serving
from support.waiting import free_port, until

from mlx_launcher.demo import build_random
from mlx_launcher.models.directory import check
from mlx_launcher.models.resolve import find

NAME = "org/tiny"
SCRIPT = """
import json, sys, time
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # 10 MB are more than the whole model
from mlx_launcher.errors import LaunchError
from mlx_launcher.models.download import download

def say(what, part):
    print(json.dumps({"at": time.monotonic(), "what": what, **part}), flush=True)

try:
    print(json.dumps({"path": str(download(sys.argv[1], say))}))
except LaunchError as error:
    print(json.dumps({"error": error.as_json()}))
"""


class Outcome(NamedTuple):
    path: Path | None
    error: dict[str, str]
    said: list[dict[str, Any]]


class Client:
    """Downloads in processes of their own, as a command does, with a home of their own."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.home, self.hub = home, hub
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url}

    def begin(self, name: str = NAME, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, name],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str = NAME, **environment: str) -> Outcome:
        process = self.begin(name, **environment)
        out, err = process.communicate(timeout=60)
        assert err == ""  # no bars, no warnings: the caller's terminal is the caller's
        *said, last = map(json.loads, out.splitlines())
        return Outcome(Path(last["path"]) if "path" in last else None, last.get("error", {}), said)

    def partials(self) -> list[Path]:
        return list(self.home.rglob("*.partial"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = build_random(tmp_path_factory.mktemp("models") / "tiny")
    return {
        **{file.name: file.read_bytes() for file in model.iterdir()},
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"x" * 100,
        "original/model.safetensors": b"x" * 100,
        "README.md": b"# Tiny",
    }


@pytest.fixture
def client(tmp_path: Path, files: dict[str, bytes]) -> Iterator[Client]:
    with serving(Hub(NAME, dict(files))) as hub:
        yield Client(tmp_path / "home", hub)


def test_a_model_is_downloaded_once_and_found_from_then_on(client: Client, files: dict[str, bytes]) -> None:
    done = client()
    assert done.path is not None, done.error
    assert done.path.name == COMMIT
    check(done.path)
    assert {file.name for file in done.path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "recipe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (done.path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert find(NAME, "/", client.environment) == done.path
    assert client.partials() == []

    sent = client.hub.sent
    assert client().path == done.path
    assert client.hub.sent == sent


def test_the_hubs_own_client_finds_it(client: Client) -> None:
    path = client().path
    script = f"from huggingface_hub import snapshot_download as s; print(s({NAME!r}, allow_patterns='*.json'))"
    offline = {**client.environment, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(path), done.stderr


def test_progress_in_bytes_at_most_twice_a_second(client: Client, files: dict[str, bytes]) -> None:
    client.hub.bytes_per_s = len(files["model.safetensors"]) / 2
    said = client().said
    totals = {line["total"] for line in said}
    assert len(totals) == 1
    assert len(files["model.safetensors"]) < totals.pop() < len(files["model.safetensors"]) + 50_000
    assert [line["done"] for line in said] == sorted(line["done"] for line in said)
    assert said[-1]["done"] == said[-1]["total"]
    assert any(0 < line["done"] < line["total"] for line in said)
    gaps = [later["at"] - line["at"] for line, later in pairwise(said[:-1])]
    assert gaps
    assert min(gaps) > 0.4
    assert NAME in said[0]["what"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_was(
    client: Client, files: dict[str, bytes], how: signal.Signals
) -> None:
    whole = len(files["model.safetensors"])
    client.hub.bytes_per_s = 1_000_000
    process = client.begin()
    until(lambda: any(file.stat().st_size > 500_000 for file in client.partials()), 30, "half a download")
    process.send_signal(how)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert find(NAME, "/", client.environment) is None

    (partial,) = client.partials()
    kept = partial.stat().st_size
    client.hub.bytes_per_s = None
    done = client()
    assert done.path is not None, done.error
    assert client.hub.ranges == [None, f"bytes={kept}-"]
    assert done.said[-1]["done"] == done.said[-1]["total"]
    assert (done.path / "model.safetensors").stat().st_size == whole
    assert (done.path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_connection_that_breaks_is_taken_up_again(client: Client) -> None:
    client.hub.cut_after = 1_000_000
    done = client()
    assert done.path is not None, done.error
    assert len(client.hub.ranges) == 2
    check(done.path)


def test_what_a_bad_disk_kept_is_noticed_and_fetched_anew(client: Client, files: dict[str, bytes]) -> None:
    client.hub.bytes_per_s = 1_000_000
    process = client.begin()
    until(lambda: any(file.stat().st_size > 500_000 for file in client.partials()), 30, "half a download")
    process.kill()
    process.communicate()
    (partial,) = client.partials()
    partial.write_bytes(b"\0" * partial.stat().st_size)
    client.hub.bytes_per_s = None
    assert client().error["code"] == "download_failed"
    assert find(NAME, "/", client.environment) is None
    done = client()
    assert done.path is not None
    assert (done.path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_two_at_once_fetch_it_once(client: Client, files: dict[str, bytes]) -> None:
    client.hub.bytes_per_s = 2_000_000
    processes = [client.begin() for _ in range(2)]
    paths = {json.loads(process.communicate(timeout=60)[0].splitlines()[-1])["path"] for process in processes}
    assert len(paths) == 1
    assert client.hub.sent == len(files["model.safetensors"])


def test_a_revision_is_kept(client: Client) -> None:
    client.hub.revisions.add("v2")
    done = client(f"{NAME}@v2")
    assert done.path is not None, done.error
    assert find(f"{NAME}@v2", "/", client.environment) == done.path
    assert find(f"{NAME}@{COMMIT}", "/", client.environment) == done.path
    assert find(NAME, "/", client.environment) is None  # nobody asked what main is
    assert "v1" in client(f"{NAME}@v1").error["message"]


def test_a_token_is_sent(client: Client) -> None:
    client(HF_TOKEN="hf_secret")
    assert client.hub.tokens >= {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "header", "code", "words"),
    [
        (404, "RepoNotFound", "model_not_found", "HF_TOKEN"),
        (401, "", "model_not_found", "HF_TOKEN"),  # what the hub says to a stranger who asks for what is not there
        (403, "GatedRepo", "model_gated", "HF_TOKEN"),
        (401, "GatedRepo", "model_gated", "HF_TOKEN"),
        (503, "", "hub_unreachable", "503"),
    ],
)
def test_what_the_hub_refuses(client: Client, status: int, header: str, code: str, words: str) -> None:
    client.hub.status, client.hub.error_code = status, header
    error = client().error
    assert error["code"] == code
    assert words in error["message"] + error["hint"]
    assert NAME in error["message"]
    assert "\n" not in error["message"]


def test_no_network(client: Client) -> None:
    error = client(HF_ENDPOINT=f"http://127.0.0.1:{free_port()}").error
    assert error["code"] == "hub_unreachable"
    assert "network" in error["hint"]


def test_offline_on_purpose(client: Client) -> None:
    error = client(HF_HUB_OFFLINE="1").error
    assert error["code"] == "hub_unreachable"
    assert "HF_HUB_OFFLINE" in error["message"]


def test_no_room_is_told_with_the_numbers_before_it_starts(client: Client) -> None:
    client.hub.sizes["model.safetensors"] = 10**18
    error = client().error
    assert error["code"] == "disk_full"
    assert "needs 1000000000.0 GB" in error["message"]
    assert "GB are free" in error["message"]
    assert client.hub.sent == 0


@pytest.mark.parametrize(
    ("kept", "words"),
    [({"config.json", "pytorch_model.bin"}, "no model*.safetensors"), ({"config.json", "m.gguf"}, "llama.cpp")],
)
def test_a_repository_without_mlx_weights(client: Client, kept: set[str], words: str) -> None:
    client.hub.files = {name: client.hub.files.get(name, b"") for name in kept}
    error = client().error
    assert error["code"] == "model_unsupported"
    assert words in error["message"]


def test_a_repository_that_is_not_whole(client: Client) -> None:
    del client.hub.files["tokenizer.json"]
    error = client().error
    assert error["code"] == "model_incomplete"
    assert "tokenizer.json" in error["message"]


def test_a_cache_that_cannot_be_written(client: Client) -> None:
    client.home.mkdir()
    (client.home / ".cache").touch()
    error = client().error
    assert error["code"] == "download_failed"
    assert ".cache" in error["message"]
