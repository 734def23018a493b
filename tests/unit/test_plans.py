"""Plans as the supervisor takes them, and what it tells about two that differ."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.supervised import make_plan

from mlx_launcher.supervisor import plans

PLAN = make_plan(Path("/state/8081"), 8081)


def changed(**changes: Any) -> Any:
    plan = copy.deepcopy(PLAN)
    for path, value in changes.items():
        *rooms, key = path.split("__")
        at = plan
        for room in rooms:
            at = at[room]
        at[key] = value
    return plan


def differences(old: Any, new: Any) -> list[str]:
    return plans.changes(plans.check(old), plans.check(new))


def test_a_plan_is_taken_as_it_is() -> None:
    assert plans.check(PLAN) is PLAN
    assert differences(PLAN, copy.deepcopy(PLAN)) == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema", 2, "plan.schema is 2"),
        ("port", "8081", "plan.port is str"),
        ("port", True, "plan.port is bool"),
        ("hosts", ["::1", 4], "plan.hosts is int"),
        ("backend__kind", "docker", "plan.backend.kind is 'docker'"),
        ("backend__argv", [], "plan.backend.argv is empty"),
        ("restart__window_s", None, "plan.restart.window_s is NoneType"),
        ("source", None, "plan.source is NoneType"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plans.check(changed(**{path: value}))


@given(
    st.recursive(
        st.none() | st.booleans() | st.text() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_anything_else_is_refused_in_words(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^plan"):
        plans.check(value)


def test_differences_are_told_in_the_users_names() -> None:
    new = changed(stop_timeout_s=10.0, restart__max_restarts=9, model__path="/m", hosts=["::1"])
    assert differences(PLAN, new) == [
        'hosts ["127.0.0.1", "::1"] → ["::1"]',
        "model.path /models/fake → /m",
        "stopTimeout 5 → 10",
        "restart.maxRestarts 3 → 9",
    ]


def test_long_values_are_cut() -> None:
    (line,) = differences(PLAN, changed(model__path="x" * 1000))
    assert len(line) < 200


@pytest.mark.parametrize("key", ["api_key", "apiKey", "hf_token", "clientSecret", "password"])
def test_a_secret_is_not_shown(key: str) -> None:
    old, new = changed(backend__settings={key: "old"}), changed(backend__settings={key: "new"})
    (line,) = differences(old, new)
    assert line.endswith(" changed")
    (line,) = differences(PLAN, changed(fallback={**PLAN["backend"], "settings": {key: "new"}}))
    assert line == "fallback changed"


def test_what_only_looks_like_a_secret_is_shown() -> None:
    new = changed(backend__settings={"a": 1, "api_key": None, "require_key": True, "min_tokens": 7})
    assert differences(PLAN, new) == ["backend.requireKey null → true", "backend.minTokens null → 7"]


def test_the_file_that_a_plan_was_made_of() -> None:
    argv = ["python", "-m", "mlx_launcher", "--config=mine.json", "plan"]
    assert plans.config_file(changed(source={"argv": argv, "cwd": "/there", "env": {}})) == "/there/mine.json"
    assert plans.config_file(changed(source={"argv": argv[:3], "cwd": "/there", "env": {}})) is None


def test_notes_and_source_make_no_other_server() -> None:
    new = changed(notes=["a"], source__cwd="/elsewhere")
    assert plans.same_server(PLAN, new)  # type: ignore[arg-type]
    assert differences(PLAN, new) == ["source changed"]
    assert not plans.same_server(PLAN, changed(stop_timeout_s=1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("given_", "notes"), [(["a", 1], ["a", "1"]), (None, []), ("text", [])])
def test_notes(given_: Any, notes: list[str]) -> None:
    assert plans.notes(changed(notes=given_)) == notes
