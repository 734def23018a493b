"""Every problem at once, each with its path and its remedy; and any JSON at all is a plan or a list of problems."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_launcher.backends.assemble import Caller, Flags, assemble
from mlx_launcher.backends.review import review
from mlx_launcher.cli.output import error_line
from mlx_launcher.config import modes
from mlx_launcher.config.check import check_all, check_block
from mlx_launcher.config.document import Document, read
from mlx_launcher.config.problems import Problem, shown
from mlx_launcher.config.schema import Block, Cache, Configuration, Restart, json_schema
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.models import download

ROOT = Path(__file__).parents[2]


def document(data: dict[str, Any]) -> Document:
    return Document(Path("/c/.anyclauderc.json"), Path("/c"), data, [])


def problems_of(**block: Any) -> dict[str, Problem]:
    found = check_all(document({"backends": {"mlx": block}}))
    return {problem.key.removeprefix("backends.mlx."): problem for problem in found}


def test_all_problems_at_once_each_with_its_path() -> None:
    found = check_all(
        document(
            {
                "backend": 7,
                "pythonVenv": [],
                "backends": {
                    "mlx": {"port": "8081", "cache": {"cache_slots": "ten", "dir": 1}, "restart": 3, "prt": 1},
                    "other": {"stopTimeout": "soon", "env": {"A": 1}, "toolAllowlist": ["a", 2]},
                    "claude": "off",
                },
            }
        )
    )
    assert {(problem.severity, problem.key) for problem in found} == {
        ("error", "backend"),
        ("error", "pythonVenv"),
        ("error", "backends.mlx.port"),
        ("error", "backends.mlx.cache.cache_slots"),
        ("error", "backends.mlx.cache.dir"),
        ("error", "backends.mlx.restart"),
        ("warning", "backends.mlx.prt"),
        ("error", "backends.other.stopTimeout"),
        ("error", "backends.other.env.A"),
        ("error", "backends.other.toolAllowlist.1"),
        ("error", "backends.claude"),
    }


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("8081", "a whole number is wanted, not a text"),
        (True, "a whole number is wanted, not true"),
        (8081.5, "a whole number is wanted"),
        (0, "a number of 1 or more is wanted"),
        (65536, "a number of 65535 or less is wanted"),
        ([], "a whole number is wanted, not a list"),
        (10**40, "is wanted"),
    ],
)
def test_what_is_said_about_a_port(value: object, says: str) -> None:
    problem = problems_of(port=value)["port"]
    assert problem.severity == "error"
    assert says in problem.message


@pytest.mark.parametrize(
    ("key", "near"),
    [("modelpath", "modelPath"), ("stop_timeout", "stopTimeout"), ("servrScript", "serverScript"), ("zzz", None)],
)
def test_an_unknown_key_is_a_warning_with_the_nearest_known(key: str, near: str | None) -> None:
    problem = problems_of(**{key: 1})[key]
    assert problem.severity == "warning"
    assert problem.hint == (f"Did you mean {near}?" if near else "")


def test_unknown_keys_inside_are_found_too() -> None:
    found = problems_of(cache={"cache_slot": 1}, distributed={"enable": False})
    assert found["cache.cache_slot"].hint == "Did you mean cache_slots?"
    assert found["distributed.enable"].hint == "Did you mean enabled?"


def test_a_broken_key_hides_nothing_of_its_neighbours() -> None:
    checked = check_block(document({"backends": {"mlx": {"port": "x", "cache": {"dir": 1, "cache_slots": 3}}}}), "mlx")
    assert checked.values == {"cache.cache_slots": 3}


def test_null_is_the_default_everywhere() -> None:
    names = dict.fromkeys(Block.model_fields)
    nested = {"cache": dict.fromkeys(Cache.model_fields), "restart": dict.fromkeys(Restart.model_fields)}
    assert problems_of(**{**names, **nested}) == {}


@pytest.mark.parametrize(
    ("block", "key", "says"),
    [
        ({"port": 8081, "baseUrl": "http://localhost:8080/v1"}, "port", "port is 8081 and baseUrl says 8080"),
        ({"port": 8081, "baseUrl": "http://localhost/v1"}, "port", "baseUrl says 80"),
        ({"baseUrl": "http://10.255.255.254:1/v1"}, "baseUrl", "another machine"),
        ({"baseUrl": "http://far.example:1/v1"}, "baseUrl", "another machine"),
        ({"baseUrl": "https://localhost:1/v1"}, "baseUrl", "speaks http"),
        ({"baseUrl": "http://localhost:1/api"}, "baseUrl", "under /v1"),
        ({"baseUrl": "localhost:8081"}, "baseUrl", "no http URL"),
        ({"baseUrl": "http://[::1:1/v1"}, "baseUrl", "no URL"),
        ({"baseUrl": "http://localhost:99999/v1"}, "baseUrl", "no URL"),
        ({"baseUrl": "http://localhost:0/v1"}, "baseUrl", "port 0"),
        ({"host": "example.org"}, "host", "an address is wanted"),
        ({"env": {"A=B": "x"}}, "env.'A=B'", "no name of an environment variable"),
        ({"command": []}, "command", "empty"),
        ({"metricsPort": 8081}, "metricsPort", "the port of the server itself"),
        ({"port": 9000, "metricsPort": 9000}, "metricsPort", "the port of the server itself"),
        ({"baseUrl": "http://localhost:9/v1", "metricsPort": 9}, "metricsPort", "the port of the server itself"),
        ({"distributed": {"enabled": True, "strategy": "zigzag"}}, "distributed.strategy", "zigzag is not known"),
    ],
)
def test_keys_that_contradict_each_other_or_this_machine(block: dict[str, Any], key: str, says: str) -> None:
    problem = problems_of(**block)[key]
    assert problem.severity == "error"
    assert says in problem.message


def test_words_of_a_cluster_that_are_not_known_matter_where_there_is_one() -> None:
    """Another connection bars no start, and anyclaude may know other words."""
    words = {"strategy": "zigzag", "connection": "wifi"}
    assert problems_of(distributed=words) == {}
    found = problems_of(distributed={**words, "enabled": True})
    assert {key: problem.severity for key, problem in found.items()} == {
        "distributed.strategy": "error",
        "distributed.connection": "warning",
    }
    blocks = {"mlx-cluster": {"distributed": words}}
    assert [problem.severity for problem in check_all(document({"backends": blocks}))] == ["error", "warning"]
    good = {"strategy": "Pipeline", "connection": "RING", "enabled": True}
    assert problems_of(distributed=good, port=9000, metricsPort=8081) == {}


@pytest.mark.parametrize(
    "block",
    [
        {"port": 8081, "baseUrl": "http://localhost:8081/v1/"},
        {"baseUrl": "http://127.0.0.1:8081/v1"},
        {"baseUrl": "http://[::1]:8081/v1"},
        {"host": "10.1.2.3", "baseUrl": "http://10.1.2.3:8081/v1", "apiKey": "k"},
    ],
)
def test_urls_of_this_machine(block: dict[str, Any]) -> None:
    assert problems_of(**block) == {}


@pytest.mark.parametrize(
    ("blocks", "path", "says"),
    [
        ({"mlx": {"fallback": "mlx"}}, "backends.mlx.fallback", "mlx -> mlx"),
        ({"mlx": {"fallback": "b"}, "b": {"fallback": "mlx"}}, "backends.b.fallback", "mlx -> b -> mlx"),
        ({"mlx": {"fallback": "b"}, "b": {"fallback": "b"}}, "backends.b.fallback", "b -> b"),
        ({"mlx-textgen": {"fallback": "mlx"}}, "backends.mlx-textgen.fallback", "circle"),
        ({"mlx": {"fallback": "mlx-lgacy"}}, "backends.mlx.fallback", "no backend mlx-lgacy"),
        ({"mlx": {"fallback": "claude"}}, "backends.mlx.fallback", "no server"),
    ],
)
def test_fallbacks(blocks: dict[str, Any], path: str, says: str) -> None:
    found = {problem.key: problem for problem in check_all(document({"backends": blocks}))}
    assert found[path].severity == "error"
    assert says in found[path].message


def test_a_fallback_that_needs_no_block() -> None:
    assert check_all(document({"backends": {"mlx": {"fallback": "mlx-legacy"}}})) == []


def test_a_value_is_never_shown_in_a_problem() -> None:
    found = problems_of(apiKey=["s3cret"], env={"KEY": ["s3cret"]}, command=[["s3cret"]], port="s3cret")
    assert len(found) == 4
    assert "s3cret" not in "".join(problem.line for problem in found.values())


def test_names_out_of_a_file_are_short_and_plain() -> None:
    assert shown("mlx-textgen") == "mlx-textgen"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) == 60


def test_the_nearest_of_the_backends() -> None:
    with pytest.raises(LaunchError) as caught:
        modes.find_block("mlx_textgen", {"mine": {}})
    assert (caught.value.code, caught.value.exit_code) == ("unknown_mode", 4)
    assert caught.value.hint.startswith("Did you mean mlx-textgen? Known: mine, mlx, ")


# -- the shipped files


@pytest.mark.parametrize("name", ["anyclauderc.example.json", "anyclauderc.example.yaml"])
def test_the_example_has_no_problems_and_serves(name: str, tmp_path: Path) -> None:
    model = build_random(tmp_path / "model")
    file = tmp_path / name
    file.write_text((ROOT / "config" / name).read_text().replace("/path/to/your/mlx/model", str(model)))
    example = read(file)
    assert check_all(example) == []
    jsonschema.validate(example.data, json_schema())
    caller = Caller([], str(tmp_path), {})
    assert assemble(Flags(), tmp_path, caller, example)["model"] == {"id": "qwen3-coder", "path": str(model)}
    plain = assemble(Flags(model=str(model)), tmp_path, caller)
    same = assemble(Flags(), tmp_path, caller, example)
    # The example writes every default down.
    for key in ("port", "hosts", "stop_timeout_s", "hang_timeout_s", "freeze_timeout_s", "idle_timeout_s", "restart"):
        assert same[key] == plain[key]
    assert same["backend"]["settings"]["cache"] == plain["backend"]["settings"]["cache"]


def test_the_shipped_schema_is_the_codes() -> None:
    shipped = json.loads((ROOT / "config" / "anyclauderc.schema.json").read_text())
    assert shipped == json_schema(), "write it again: mlx-launch config schema > config/anyclauderc.schema.json"
    jsonschema.Draft202012Validator.check_schema(shipped)


def test_the_schema_and_the_check_agree_about_what_is_wrong() -> None:
    for block in (
        {"port": "x"},
        {"stopTimeout": "soon"},
        {"cache": {"maxBytes": "40"}},
        {"command": [1]},
        {"env": {"a": 1}},
    ):
        assert any(problem.severity == "error" for problem in problems_of(**block).values())
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"backends": {"mlx": block}}, json_schema())


def test_a_prompt_file_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "there.json").touch()
    model = build_random(tmp_path / "model")
    block = {"model": str(model), "warmup": {"promptFiles": ["there.json", "gone.json"]}}
    file = tmp_path / ".anyclauderc.json"
    file.write_text(json.dumps({"backends": {"mlx": block}}))
    (problem,) = review(Flags(), {}, read(file), "/")
    assert (problem.severity, problem.key) == ("warning", "backends.mlx.warmup.promptFiles.1")
    assert str(tmp_path / "gone.json") in problem.message


# -- any JSON at all

_KEYS = st.sampled_from([*Configuration.model_fields, *Block.model_fields, *Cache.model_fields, "// x", "prt", ""])
_NAMES = st.sampled_from([*modes.KNOWN, "mine"])
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | _NAMES
    | st.sampled_from(
        ["30s", "http://localhost:81/v1", "/", "~", "~x/y", "a/b", "{model}", "0.0.0.0", "::", "\0", "\ud800"]
    )
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | _NAMES, inner, max_size=4),
    max_leaves=12,
)
_BLOCKS = st.dictionaries(_NAMES, st.dictionaries(_KEYS, _JSON, max_size=6) | _JSON, max_size=4)
_LIKELY = st.fixed_dictionaries(
    {}, optional={"backend": _NAMES | _JSON, "backends": _BLOCKS | _JSON, "pythonVenv": _JSON}
)


def no_download(name: str, _: object) -> Path:
    raise LaunchError("download_failed", f"{name} is not downloaded in a test", "")


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=_LIKELY | _JSON, mode=st.none() | _NAMES, use_demo=st.booleans())
def test_any_json_is_a_plan_or_an_error_of_one_line(
    data: Any, mode: str | None, use_demo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "download", no_download)
    model = tmp_path / "models" / "demo"
    if not model.exists():
        build_random(model)
    file = tmp_path / ".anyclauderc.json"
    file.write_text(json.dumps(data))
    caller = Caller(["x"], str(tmp_path), {"HF_HOME": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"})
    try:
        found = read(file)
        assert all(problem.line for problem in review(Flags(mode=mode), caller.environment, found, caller.cwd))
        plan = assemble(Flags(mode=mode, demo=use_demo), tmp_path, caller, found)
    except LaunchError as error:
        said = error_line(error)
    else:
        said = json.dumps(plan)
        assert json.loads(said) == plan
    assert "\n" not in said


def test_what_is_no_number_in_yaml_is_none_here(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("backends: {mlx-cluster: {distributed: {peers: [{host: a, memory_gb: .nan}]}}}")
    (found,) = check_all(read(file))
    assert found.line == "backends.mlx-cluster.distributed.peers.0.memory_gb: a number is wanted"


def test_a_message_does_not_contradict_itself() -> None:
    found = problems_of(maxQueue=1.5, baseUrl="http://localhost:8081")
    assert found["maxQueue"].message == "a whole number is wanted"
    assert found["baseUrl"].message == "the server answers under /v1, and the URL has no path"
