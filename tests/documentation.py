"""Runs what the pages say: `make docs-test`, or `python tests/documentation.py [PAGE …]`.

Page by page, in a copy of the tree with a new home and state directory: commands in their order, configuration files through
`config validate`, shown output against the real one (the words, not the numbers). Models of the hub stand in for themselves with
random weights. What cannot be run here is in NOT_HERE, with the reason, and printed. Exits 1 if anything is not as it is written.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.launched import processes_naming
from support.pages import ROOT, Block, Step, blocks, pages, steps

from mlx_launcher.demo import build_random

PORT = 8081  # the one that the pages mean where they name none
# Models that a page names, and the family that stands in for each.
ON_THE_HUB = {"mlx-community/Qwen3-4B-4bit": "qwen3"}
AT_HOME = {"models/Qwen3-Coder-30B-A3B-4bit": "qwen3_moe"}
HALF_DOWNLOADED = "org/half-downloaded"
# A file beside a configuration that a page shows.
CAPTURED = "prompts/claude-code.json"

# Run in another form: nobody is here to answer a question or to press Ctrl-C, and a measurement takes its time.
REPLACED = [
    (
        r"(\S+/bin)/pip install -c constraints.txt \.$",
        rf"ln -s {Path(sys.executable).with_name('mlx-launch')} \1/mlx-launch",
        "`make release-check` installs it",
    ),
    (
        r"service install( --demo)\b(?!.*--dry-run).*",
        r"start\1",
        "the login session's services stay as they are; tests/e2e/test_service.py installs one",
    ),
    (r",mine\b", "", "no server of a user's own is here"),
    (r"(mlx-launch rollback(?: --undo)?)$", r"\1 --yes", "nobody answers its question"),
    (
        r"^(\S*mlx-launch (?:logs -f|status --watch|run\b.*))$",
        r"timeout -s INT 5 \1 || [ $? = 124 ]",
        "ended after 5 s",
    ),
    (r"(mlx-launch bench\b)((?! --turns).*)$", r"\1\2 --turns 1 --prompt-tokens 200", "short"),
    (
        r"^make (test|test-faults|test-cluster|bench|soak|docs-test|release-check|pictures|clean)\b",
        r"make -n \1",
        "long",
    ),
]
NOT_HERE = [
    (r"^(anyclaude|claude)\b", "is no part of this project; its requests are replayed in tests/contract"),
    (r"\bpip install\b.*cuda", "downloads gigabytes, for a GPU that may not be here"),
    (
        r"\bservice (uninstall|status)|^(launchctl|systemctl|loginctl|journalctl|plutil|kill|sleep)\b",
        "changes or needs the login session's services; tests/e2e/test_service.py does it",
    ),
    (r"^ssh\b|\bcluster check\b", "needs other machines; `make test-cluster` has them"),
]
# What a reader of these pages has done before.
_CONFIGURED = "mlx-launch config init --model ~/models/Qwen3-Coder-30B-A3B-4bit"
_LONG = """-d '{"messages": [{"role": "user", "content": "'"$(seq 400 | tr '\\n' ' ')"'"}], "max_tokens": 4}'"""
BEFORE = {
    "README.md": [_CONFIGURED],
    "docs/rollback.md": [_CONFIGURED, "mlx-launch start"],
    "docs/bench.md": [_CONFIGURED],
    "docs/watching.md": ["mlx-launch start --demo"],
    "docs/cache.md": [
        _CONFIGURED,
        "mlx-launch start",
        f"curl -sSf http://127.0.0.1:{PORT}/v1/chat/completions -H 'Content-Type: application/json' {_LONG}",
        "mlx-launch restart",
    ],
    "docs/migration.md": [
        _CONFIGURED,
        'sed -i.was \'s|"serverScript": ".*"|"serverScript": "scripts/mlx-textgen-server.sh"|\' .anyclauderc.json',
        "rm -r ~/.anyclaude",
    ],
}
# Words of shown output that depend on the machine, the model or the moment.
VARIES = {
    *("kB", "MB", "GB", "min", "d", "h", "s", "ago", "in", "use", "of"),
    *("bit", "yes", "the", "share"),  # a Mac's, with a model whose weights are packed
}
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "dist", "build")
TIMEOUT_S = 180


class World:
    """A page's own home, copy of the tree and shell, whose directory and variables last from command to command."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.tree = scratch / "mlx-launch"
        self.home = scratch / "home"
        shutil.copytree(ROOT, self.tree, ignore=NOT_COPIED)
        _link_environment(self.tree / ".venv")
        for name, family in AT_HOME.items():
            build_random(self.home / name, family)
        hub = self.home / ".cache" / "huggingface" / "hub"
        for name, family in {**ON_THE_HUB, HALF_DOWNLOADED: "llama"}.items():
            _stand_in(hub / f"models--{name.replace('/', '--')}", family, whole=name != HALF_DOWNLOADED)
        (scratch / CAPTURED).parent.mkdir()
        (scratch / CAPTURED).write_text('{"messages": [{"role": "user", "content": "Good morning."}]}')
        self._variables, self._cwd = scratch / "variables", scratch / "cwd"
        self._variables.touch()
        self._cwd.write_text(str(self.tree))
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "PYTHON", "ANYCLAUDE"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        self._environment = {**kept, "HOME": str(self.home), "PATH": path, "HF_HUB_OFFLINE": "1", "TERM": "dumb"}

    def run(self, command: str) -> tuple[int, str]:
        """Its exit code, and all that it wrote."""
        shell = (
            f'cd "$(cat {self._cwd})" && . {self._variables} && set -o pipefail\n{command}\n'
            f"code=$?; export -p > {self._variables}; pwd > {self._cwd}; exit $code"
        )
        done = subprocess.run(
            ["bash", "-c", shell],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return done.returncode, done.stdout

    def end(self) -> list[str]:
        """Stops what a page left running; what goes on all the same is ended, and named."""
        for instance in (self.home / ".anyclaude" / "mlx-launch").glob("[0-9]*"):
            self.run(f"mlx-launch stop --port {instance.name}")
        left = processes_naming(str(self.scratch))
        names = [" ".join(process.cmdline()) for process in left]
        for process in left:
            process.kill()
        return names


class Report:
    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.not_run: dict[str, str] = {}
        self.replaced: dict[str, str] = {}

    def page(self, page: Path) -> None:
        began, before, wrong = time.monotonic(), Counter(self.done), len(self.wrong)
        with tempfile.TemporaryDirectory(prefix="docs-", ignore_cleanup_errors=True) as scratch:
            world = World(Path(scratch))
            try:
                for command in BEFORE.get(page.relative_to(ROOT).as_posix(), []):
                    code, said = world.run(command)
                    self.wrong += [f"{page.name}: before it, {command} ended with {code}: {said}"] if code else []
                for block in blocks(page):
                    self.block(world, block)
            finally:
                self.wrong += [f"{page.name}: left running: {name}" for name in world.end()]
        did = ", ".join(f"{count} {what}" for what, count in (self.done - before).items()) or "nothing to run"
        result = "ok" if len(self.wrong) == wrong else "WRONG"
        print(f"{page.relative_to(ROOT)!s:28} {result:6} {time.monotonic() - began:4.0f} s  {did}", flush=True)

    def block(self, world: World, block: Block) -> None:
        place = f"{block.page}:{block.line}"
        if block.kind in ("commands", "session"):
            for step in steps(block):
                self.step(world, step, place)
        elif block.kind in ("json", "yaml"):
            self.done["files"] += 1
            self.wrong += [f"{place}: {reason}" for reason in _validated(world, block)]
        elif block.kind == "python":
            self.done["programs"] += 1
            (world.scratch / "program.py").write_text(block.text)
            code, said = world.run(f"{sys.executable} {world.scratch / 'program.py'}")
            self.wrong += [f"{place}: it ended with {code}: {said}"] if code else []

    def step(self, world: World, step: Step, place: str) -> None:
        for pattern, why in NOT_HERE:
            if re.search(pattern, step.command):
                self.not_run[step.command] = why
                return
        command = step.command
        for pattern, form, why in REPLACED:
            if (other := re.sub(pattern, form, command)) != command:
                self.replaced[command], command = f"{other}  ({why})", other
        self.done["commands"] += 1
        try:
            code, said = world.run(command)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{place}: {command}: it did not end in {TIMEOUT_S} s")
            return
        if code:
            self.wrong.append(f"{place}: {command}: it ended with {code}: {said.strip()}")
        elif missing := _missing(step.shown, said):
            self.wrong.append(f"{place}: {command}: the page shows {', '.join(missing)}; it said:\n{said}")
        self.done["outputs"] += bool(step.shown)


def _link_environment(venv: Path) -> None:
    """The environment that this runs in, as `make` sets one up."""
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (venv / entry.name).symlink_to(entry)
    (venv / ".installed").touch()


def _stand_in(repository: Path, family: str, whole: bool) -> None:
    """A repository as the hub's cache has it."""
    commit = "0" * 40
    model = build_random(repository / "snapshots" / commit, family)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    if not whole:
        first, second = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
        (model / "model.safetensors").rename(model / first)
        shards = {"weight_map": {"model.embed_tokens.weight": first, "lm_head.weight": second}}
        (model / "model.safetensors.index.json").write_text(json.dumps(shards))


def _validated(world: World, block: Block) -> Iterator[str]:
    """What is wrong with a configuration, or a part of one; anything else has to be JSON, and no more."""
    text = block.text
    if block.kind == "json":
        try:
            data = json.loads(text if text.startswith(("{", "[")) else f"{{{text}}}")
        except ValueError as error:
            yield f"no JSON: {error}"
            return
        if not text.startswith("{"):
            data = {"backends": {"mlx": {"modelPath": f"~/{next(iter(AT_HOME))}", **data}}}
        if "backends" not in data:
            return
        text = json.dumps(data)
    file = world.scratch / f"shown.{block.kind}"
    file.write_text(text)
    code, said = world.run(f"mlx-launch --config {file} config validate")
    # The model of a page is on its reader's machine.
    told = [line for line in said.splitlines() if "nothing is wrong" not in line and "there is no model at" not in line]
    if code or told:
        yield said


def _missing(shown: list[str], said: str) -> list[str]:
    """The words that a page shows and the command did not say."""
    there = set(_words(said))
    return [word for word in dict.fromkeys(_words(" ".join(shown))) if word not in there and word not in VARIES]


def _words(text: str) -> Iterator[str]:
    """Without names, paths and numbers."""
    for part in text.split():
        word = part.strip(".,:;()\"'")
        if word.isalpha():
            yield word


def main(names: list[str]) -> int:
    chosen = [page for page in pages() if not names or page.name in names or page.relative_to(ROOT).as_posix() in names]
    with socket.socket() as sock:
        if not sock.connect_ex(("127.0.0.1", PORT)):
            print(f"Port {PORT}, which the pages use, is taken: mlx-launch stop", file=sys.stderr)
            return 1
    report = Report()
    for page in chosen:
        report.page(page)
    for title, rows in (("In another form", report.replaced), ("Not run here", report.not_run)):
        if rows:
            print(f"\n{title}:")
        for command, why in rows.items():
            print(f"  {command}: {why}")
    for reason in report.wrong:
        print(f"\n{reason}", file=sys.stderr)
    return 1 if report.wrong or not report.done else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
