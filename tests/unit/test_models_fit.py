"""How much memory there is, and whether a model fits into it."""

import sys
from pathlib import Path

import pytest
from support.modeldirs import model_directory

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.facts import facts
from mlx_launcher.models.fit import check, judge, needed_bytes
from mlx_launcher.system import memory
from mlx_launcher.system.memory import Memory, cgroup_limit, model_memory, parse_sysctl

GB = 10**9
# 16 KiB a token, and about 4 GB.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
WEIGHTS = {"model.embed_tokens.weight": ("F16", (2 * GB // 64, 64))}
PROMPT = 8192 * 16384


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model", CONFIG, WEIGHTS)


def test_what_a_model_needs(model: Path) -> None:
    assert needed_bytes(facts(model)) == 4 * GB + PROMPT


def test_a_short_context_needs_no_more_than_itself(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "short", {**CONFIG, "max_position_embeddings": 1024}, WEIGHTS)
    assert needed_bytes(facts(path)) == 4 * GB + PROMPT // 8


@pytest.mark.parametrize(
    ("bytes_", "fits"), [(4 * GB + PROMPT - 1, "no"), (4 * GB + PROMPT, "tight"), (4.5 * GB, "tight"), (5 * GB, "yes")]
)
def test_the_verdict(model: Path, bytes_: float, fits: str) -> None:
    assert judge(facts(model), Memory(int(bytes_), "")) == fits


def test_a_model_larger_than_memory_is_refused_with_the_numbers(model: Path) -> None:
    small = Memory(3 * GB, "75 % of 4.0 GB, the GPU's share")
    with pytest.raises(LaunchError) as caught:
        check(model, force=False, memory=small)
    error = caught.value
    assert error.code == "model_too_large"
    for number in ("needs 4.1 GB", "4.0 GB of weights", "0.1 GB for a prompt of 8,192 tokens", "has 3.0 GB", "75 %"):
        assert number in error.message
    assert "--force" in error.hint
    check(model, force=True, memory=small)
    check(model, force=False, memory=Memory(5 * GB, ""))


def test_where_the_memory_is_not_known_every_model_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_launcher.models.fit.model_memory", lambda: None)
    check(model, force=False)


def test_a_broken_model_is_not_judged(model: Path) -> None:
    (model / "config.json").unlink()
    check(model, force=False, memory=Memory(1, ""))


# `sysctl -n hw.memsize iogpu.wired_limit_mb`, as macOS prints it.
@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("38654705664\n0\n", Memory(28991029248, "75 % of 38.7 GB, the GPU's share")),
        ("38654705664\n", Memory(28991029248, "75 % of 38.7 GB, the GPU's share")),  # before macOS 14
        (
            "137438953472\n122880\n",
            Memory(128849018880, "the GPU's share (iogpu.wired_limit_mb) of 137.4 GB"),
        ),
        ("", None),
        ("sysctl: unknown oid 'hw.memsize'\n", None),
    ],
)
def test_what_macos_says(output: str, expected: Memory | None) -> None:
    assert parse_sysctl(output) == expected


def test_macos_is_asked_by_an_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_SYSCTL", ("/bin/echo", "8000000000", "0"))
    assert model_memory() == Memory(6000000000, "75 % of 8.0 GB, the GPU's share")
    monkeypatch.setattr(memory, "_SYSCTL", ("/no/such/sysctl",))
    assert model_memory() is None


class Cgroups:
    def __init__(self, root: Path) -> None:
        self.root, self.membership = root / "cgroup", root / "membership"
        self.root.mkdir()

    def limit(self, own: str, limits: dict[str, str]) -> int | None:
        self.membership.write_text(f"3:cpu:/x\n0::{own}\n")
        for group, text in limits.items():
            (self.root / group).mkdir(parents=True, exist_ok=True)
            (self.root / group / "memory.max").write_text(f"{text}\n")
        return cgroup_limit(str(self.root), str(self.membership))


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("/", {}, None),
        ("/", {".": "1000"}, 1000),  # a container sees its own group as the root
        ("/a/b", {"a/b": "max"}, None),
        ("/a/b", {"a/b": "2000"}, 2000),
        ("/a/b", {"a/b": "2000", "a": "1000"}, 1000),  # what is above counts too
        ("/a/b", {"a/b": "max", "a": "1000"}, 1000),
        ("/gone", {}, None),
    ],
)
def test_the_limit_of_a_cgroup(tmp_path: Path, own: str, limits: dict[str, str], expected: int | None) -> None:
    assert Cgroups(tmp_path).limit(own, limits) == expected


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert cgroup_limit(str(tmp_path), str(tmp_path / "nowhere")) is None
    (tmp_path / "v1").write_text("4:memory:/x\n")
    assert cgroup_limit(str(tmp_path), str(tmp_path / "v1")) is None


def test_a_cgroup_lower_than_the_machine_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 1000)
    found = model_memory()
    assert found is not None
    assert found.bytes_ == 1000
    assert "cgroup" in found.what
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 1 << 62)
    whole = model_memory()
    assert whole is not None
    assert 1000 < whole.bytes_ < 1 << 62
