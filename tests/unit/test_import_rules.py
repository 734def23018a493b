"""The table of rooms in docs/architecture.md, kept by reading every import."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx_launcher

ROOT = Path(mlx_launcher.__file__).parent
LEAVES = {"errors", "plan"}
HOST_LIBRARIES = {"mlx", "mlx_lm", "mlx_textgen", "llguidance", "numpy", "pydantic", "uvicorn", "psutil"}

# room -> (rooms it may import, libraries it may import)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "cli": (
        {
            "bench",
            "config",
            "backends",
            "demo",
            "doctor",
            "service",
            "kvcache",
            "models",
            "system",
            "supervisor.control",
            *LEAVES,
        },
        {"click"},
    ),
    "config": ({"models", "system", *LEAVES}, {"pydantic", "yaml"}),
    "backends": ({"config", "models", *LEAVES}, set()),
    "supervisor": ({"system", "buckets", *LEAVES}, set()),
    "host": ({"kvcache", "models", "buckets"}, HOST_LIBRARIES),
    "kvcache": ({"models"}, set()),
    "models": ({"system", "errors"}, {"huggingface_hub"}),
    "demo": (set(), set()),
    "bench": ({"errors"}, {"matplotlib"}),
    "doctor": (
        {"backends", "config", "kvcache", "models", "service", "system", *LEAVES},
        {"jinja2", "packaging", "psutil"},
    ),
    "service": ({"config", "errors"}, set()),
    "system": (set(), {"psutil"}),
    "errors": (set(), set()),
    "buckets": (set(), set()),
    "plan": (set(), set()),
    "__main__": ({"cli"}, set()),
    "__init__": (set(), set()),
}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module
            # `from mlx_launcher import x` imports a room; `from mlx_launcher.x import y` may import a module of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def is_allowed(name: str, room: str) -> bool:
    rooms, libraries = RULES[room]
    top, *rest = name.split(".")
    if top != "mlx_launcher":
        return top in sys.stdlib_module_names or top in libraries
    return (
        not rest
        or rest[0] in {room, "__version__"}
        or any(name.startswith(f"mlx_launcher.{allowed}") for allowed in rooms)
    )


def test_every_import_is_in_the_table() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 30
    broken = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports_of(file)
        if not is_allowed(name, room_of(file))
    ]
    assert broken == []


def test_the_rules_refuse_what_they_are_there_for() -> None:
    assert not is_allowed("mlx.core", "supervisor")
    assert not is_allowed("mlx_launcher.host.engine", "supervisor")
    assert not is_allowed("mlx_launcher.supervisor.loop", "cli")
    assert not is_allowed("click", "supervisor")
    assert not is_allowed("mlx_launcher.cli.output", "host")
    assert is_allowed("mlx_launcher.supervisor.control.call", "cli")


def test_the_policy_is_pure() -> None:
    effects = {"time", "os", "socket", "subprocess", "logging", "random", "select", "selectors", "signal", "pathlib"}
    for module in ("policy", "liveness", "rules"):
        names = {name.split(".")[0] for name in imports_of(ROOT / "supervisor" / f"{module}.py")}
        assert names & effects == set()


def test_every_room_is_in_the_page_on_architecture() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert {room for room in rooms if f"| `{room}/` |" not in page} == set()
