"""What transformers learns of its models at an import is learned once, and no other for being remembered."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LEARN = """
import json, os, sys
sources = 0
def count(event, arguments):
    global sources
    if event == "open" and isinstance(arguments[0], str):
        sources += "/transformers/models/" in arguments[0] and arguments[0].endswith(".py")
sys.addaudithook(count)
if len(sys.argv) > 1:
    from mlx_launcher.host.imports import remember_exports
    remember_exports(sys.argv[1])
import transformers, transformers.models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
def plain(value):
    return sorted(value) if isinstance(value, (set, frozenset, list, tuple)) else value
exports = [{str(k): plain(v) for k, v in vars(m)[n].items()}
           for m in (transformers, transformers.models) for n in ("_import_structure", "_class_to_module")]
print(json.dumps({"sources": sources, "exports": exports, "version": transformers.__version__}))
"""


def learn(*file: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LEARN, *map(str, file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def plainly() -> dict[str, Any]:
    return learn()


def test_transformers_still_reads_its_sources_at_each_import(plainly: dict[str, Any]) -> None:
    assert plainly["sources"] > 1000, "host/imports.py need not remember what transformers exports any more"


def test_what_was_learned_is_not_learned_again(plainly: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "transformers.json"
    first, second = learn(file), learn(file)
    assert first["exports"] == second["exports"] == plainly["exports"]
    assert first["version"] == second["version"] == plainly["version"]
    assert second["sources"] < 50 < first["sources"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("change", ["torn", "empty", "another release", "another shape", "no file of ours"])
def test_what_cannot_be_used_is_learned_anew(change: str, plainly: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "transformers.json"
    learn(file)
    whole = file.read_text()
    kept = json.loads(whole)
    changed = {
        "torn": whole[: len(whole) // 2],
        "empty": "",
        "another release": json.dumps({**kept, "release": ["1.0", *kept["release"][1:]]}),
        "another shape": json.dumps({**kept, "exports": {"x": 1}}),
        "no file of ours": "[]",
    }
    file.write_text(changed[change])
    assert learn(file)["exports"] == plainly["exports"]
    assert file.read_text() == whole


def test_a_place_that_cannot_be_written_to_costs_nothing_but_time(plainly: dict[str, Any], tmp_path: Path) -> None:
    assert learn(tmp_path / "nowhere" / "transformers.json")["exports"] == plainly["exports"]
