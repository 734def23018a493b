"""The parts of the doctor that judge facts, for machines that are not at hand."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.modeldirs import model_directory

from mlx_launcher.cli import doctor as command
from mlx_launcher.cli.output import App
from mlx_launcher.cli.screen import WIDTH, columns
from mlx_launcher.config import shipped
from mlx_launcher.config.document import nothing, read
from mlx_launcher.config.layers import Flags
from mlx_launcher.demo import FAMILIES, build_random
from mlx_launcher.doctor import model, model_files, places, python, settings, state
from mlx_launcher.doctor import packages as sets
from mlx_launcher.doctor.check import Check, Subject
from mlx_launcher.doctor.examination import CHECKS, examine
from mlx_launcher.system import machine as machines
from mlx_launcher.system.machine import Machine
from mlx_launcher.system.memory import Memory

MAC = Machine("darwin", "arm64", macos=(14, 6, 1))
LINUX = Machine("linux", "x86_64", glibc=(2, 35))
PINS = {"mlx": "0.32.4", "mlx-cpu": "0.32.4", "mlx-lm": "0.32.2", "click": "8.5.1"}


@pytest.mark.parametrize(
    ("version", "machine", "result", "words"),
    [
        ((3, 12, 1), MAC, "ok", "Python 3.12.1 for arm64"),
        ((3, 11, 7), LINUX, "ok", "Python 3.11.7"),
        ((3, 10, 2), LINUX, "failed", "3.11 or newer is needed"),
        ((3, 15, 0), LINUX, "warning", "3.14"),
        ((3, 12, 1), MAC._replace(arch="x86_64", translated=True), "failed", "Rosetta"),
        ((3, 12, 1), MAC._replace(arch="x86_64"), "failed", "Intel"),
        ((3, 12, 1), MAC._replace(macos=(13, 7)), "failed", "macOS 13.7"),
        ((3, 12, 1), LINUX._replace(glibc=(2, 31)), "failed", "glibc 2.31"),
        ((3, 12, 1), LINUX._replace(glibc=None), "failed", "no glibc"),
    ],
)
def test_interpreters(version: tuple[int, ...], machine: Machine, result: str, words: str) -> None:
    found = python.interpreter(version, machine, "/bin/python")
    assert (found.name, found.result) == ("python", result)
    assert words in found.found


@pytest.mark.parametrize(
    ("machine", "report", "result", "words", "remedy"),
    [
        (MAC, {"gpu": True, "metal": True, "name": "Apple M3"}, "ok", "Metal: Apple M3", None),
        (MAC, {}, "failed", "CPU, and a Mac serves with its GPU", "mlx-metal==0.32.4"),
        (LINUX, {}, "ok", "MLX 0.32.4 computes on CPU", None),
        (LINUX._replace(nvidia=True), {}, "warning", "an NVIDIA GPU", "'mlx[cuda13]==0.32.4'"),
        # What is installed, and overwritten by the build for the CPU.
        (LINUX._replace(nvidia=True), {}, "warning", "an NVIDIA GPU", "--no-deps mlx-cuda-13==0.32.4"),
        (LINUX._replace(nvidia=True), {"gpu": True, "cuda": True, "name": "NVIDIA L4"}, "ok", "CUDA: NVIDIA L4", None),
    ],
)
def test_devices(machine: Machine, report: dict[str, Any], result: str, words: str, remedy: str | None) -> None:
    said = {"version": "0.32.4", "gpu": False, "metal": False, "cuda": False, "name": "", **report}
    found = python.computes_on(machine, said)
    assert (found.name, found.result) == ("device", result)
    assert words in found.found
    assert (found.remedy is None) == (remedy is None)
    assert (remedy or "") in (found.remedy or "")


def test_an_mlx_without_a_backend() -> None:
    said = "ImportError: libmlx.so: cannot open shared object file: No such file or directory"
    found = python.broken(LINUX, said, PINS)
    assert found.found.startswith("MLX has no backend, as after a plain `pip install mlx`")
    assert found.remedy == (
        f"{sys.executable} -m pip install --force-reinstall --no-deps 'mlx[cpu]==0.32.4' mlx-cpu==0.32.4"
    )
    said = "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory"
    found = python.broken(LINUX, said, PINS)
    assert found.found.startswith("MLX is the build for CUDA, and no NVIDIA driver is found")
    assert (found.remedy or "").endswith("mlx-cpu==0.32.4")  # which puts its library in the place of the other
    assert "MLX does not work: No module named" in python.broken(MAC, "No module named 'mlx'", {}).found


def test_an_mlx_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(python, "_PROBE_S", 0.1)
    assert python.device(LINUX, PINS).result == "warning"


def test_versions_of_a_system() -> None:
    assert machines.version("14.6.1") == (14, 6, 1)
    assert machines.version("2.35-0ubuntu3") == (2, 35)
    assert machines.version("") is None
    assert machines.machine().platform == sys.platform


def test_the_tested_set_is_shipped() -> None:
    pins = sets.pinned(shipped.read_text(".", "constraints.txt"))
    assert pins["mlx-textgen"] == "0.2.1"
    assert "mlx-metal" not in pins or sys.platform == "darwin"
    assert "huggingface-hub" in pins  # by its canonical name


class Installed:
    """What a directory of metadata says is installed, in the place of what is: a program of ours and what it requires."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        monkeypatch.setattr(sys, "path", [str(root)])

    def put(self, name: str, version: str, *requires: str) -> None:
        folder = self._root / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in requires), "", ""]))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    installed = Installed(tmp_path, monkeypatch)
    needs = [
        "click>=8.1",
        "mlx[cpu]<0.33,>=0.31.2",
        "mlx-lm<0.33,>=0.32",
        "pytest>=8; extra == 'dev'",
        "x; os_name == 'nt'",
    ]
    installed.put("mlx-launcher", "0.1.0", *needs)
    return installed


def healthy(installed: Installed, **others: str) -> list[Check]:
    versions = {"mlx": "0.32.4", "mlx_cpu": "0.32.4", "mlx_lm": "0.32.2", "click": "8.5.1", **others}
    requires = {"mlx": ["mlx-cpu==0.32.4; extra == 'cpu'"]}
    for name, version in versions.items():
        if version:
            installed.put(name.replace("_", "-"), version, *requires.get(name, []))
    return sets.packages(PINS)


def test_a_set_as_it_was_tested(installed: Installed) -> None:
    assert healthy(installed) == [Check("packages", "ok", "all 4 are as tested")]


def test_drift_within_what_is_allowed_is_a_warning_with_what_it_touches(installed: Installed) -> None:
    (found,) = healthy(installed, click="8.5.0", mlx_lm="0.32.1")
    assert found.result == "warning"
    assert "mlx-lm 0.32.1 instead of 0.32.2 (which models are served" in found.found
    assert "click 8.5.0 instead of 8.5.1" in found.found
    assert (found.remedy or "").endswith("-m pip install mlx-lm==0.32.2 click==8.5.1")


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("mlx", "0.31.1", "its streams belong to all threads there"),
        ("mlx", "0.33.0", "not tried"),
        ("mlx_lm", "0.33.0", "KV caches are kept by its functions"),
        ("click", "7.0", "click is 7.0, and mlx-launcher wants >=8.1"),
        ("click", "", "click is not installed, and mlx-launcher needs it"),
        ("mlx_cpu", "", "mlx-cpu is not installed, and mlx needs it"),
    ],
)
def test_what_is_out_of_range_or_missing_is_a_failure(
    installed: Installed, name: str, version: str, words: str
) -> None:
    (found,) = healthy(installed, **{name: version})
    assert (found.name, found.result) == ("packages", "failed")
    assert words in found.found
    pin = name.replace("_", "-")
    assert (found.remedy or "").endswith(f"-m pip install {pin}=={PINS[pin]}")


def test_a_package_whose_files_are_gone_is_installed_again(installed: Installed, tmp_path: Path) -> None:
    assert healthy(installed)[0].result == "ok"
    for name, version in (("mlx-lm", "0.32.2"), ("click", "8.5.1")):
        package = tmp_path / name.replace("-", "_")
        package.mkdir()
        (package / "__init__.py").touch()
        record = tmp_path / f"{package.name}-{version}.dist-info" / "RECORD"
        record.write_text(
            f'{package.name}/__init__.py,sha256=x,0\n{package.name}/a/b.py,,\n../../bin/x.py,,\n"a,b.py",,\n'
        )
    assert sets.packages(PINS)[0].result == "ok"
    shutil.rmtree(tmp_path / "mlx_lm")
    (found,) = sets.packages(PINS)
    assert (found.name, found.result) == ("packages", "failed")
    assert found.found == "mlx-lm is installed, and its mlx_lm/__init__.py is gone"
    assert (found.remedy or "").endswith("-m pip install --force-reinstall --no-deps mlx-lm==0.32.2")


def test_what_others_say_of_each_other_is_a_warning(installed: Installed) -> None:
    (found,) = healthy(installed, mlx_cpu="0.32.3")
    assert found.result == "warning"
    assert "mlx-cpu is 0.32.3, and mlx wants ==0.32.4" in found.found


def test_outlines_of_old() -> None:
    assert "torch" in sets._what_breaks("outlines", "0.2.3")
    assert sets._what_breaks("outlines", "1.3.3") == ""
    assert sets._what_breaks("mlx", "no version") == ""


def a_subject(root: Path) -> Subject:
    app = App([])
    app.state_dir, app.no_config = root / "state", True
    return command._subject(app, Flags())


def test_several_machines_are_called_so(tmp_path: Path) -> None:
    block = {"modelPath": str(build_random(tmp_path / "model")), "distributed": {"peers": [{"host": "127.0.0.1"}]}}
    file = tmp_path / "rc.json"
    file.write_text(json.dumps({"backend": "mlx-cluster", "backends": {"mlx-cluster": block}}))
    app = App([])
    app.state_dir, app.config = tmp_path / "state", str(file)
    assert "mlx-cluster (several machines as one) would serve" in settings.start(command._subject(app, Flags())).found


def test_a_model_that_leaves_little_memory(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", {"model_type": "llama"}, {"model.norm.weight": ("F16", (500_000, 1000))})
    subject = Subject(
        Flags(str(path)), {}, "/", tmp_path / "state", None, nothing("/"), [], lambda word, _: word, "start"
    )
    sizes = {1_050_000_000: "warning", 900_000_000: "failed", 2_000_000_000: "ok"}
    for memory, result in sizes.items():
        assert [check.result for check in model.model(subject, Memory(memory, "all"))] == ["ok", result]
    assert [check.result for check in model.model(subject, None)] == ["ok", "skipped"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_wrong_with_any_family(tmp_path: Path, family: str) -> None:
    path = build_random(tmp_path / family, family)
    assert model_files.contradiction(path) is None


def test_a_template_with_the_tags_of_transformers(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", {"model_type": "llama"})
    loop = "{% for m in messages %}{%- generation -%}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    (path / "chat_template.jinja").write_text(loop)
    assert model_files.contradiction(path) is None


def test_a_disk_without_room_for_one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 8, "num_attention_heads": 32, "hidden_size": 4096}
    path = model_directory(tmp_path / "model", config)
    subject = Subject(
        Flags(str(path)), {}, "/", tmp_path / "state", None, nothing("/"), [], lambda word, _: word, "start"
    )
    assert state.disk(subject).result == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 11 * 10**8))
    found = state.disk(subject)
    assert (found.result, found.remedy) == ("warning", "cache clear")


def test_a_bound_below_one_prompt(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 8, "num_attention_heads": 32, "hidden_size": 4096}
    path = model_directory(tmp_path / "model", config)
    file = tmp_path / "rc.json"
    file.write_text(json.dumps({"backends": {"mlx": {"modelPath": str(path), "cache": {"maxBytes": "10MB"}}}}))
    subject = Subject(Flags(), {}, "/", tmp_path / "state", file, read(file), [], lambda word, _: word, "start")
    found = state.disk(subject)
    assert (found.result, found.remedy) == ("warning", f"${{EDITOR:-vi}} {file}")


def test_a_check_that_breaks_is_a_finding(tmp_path: Path) -> None:
    def broken(_: Subject) -> Check:
        raise KeyError("x")

    (found,) = examine(a_subject(tmp_path), [("port", broken)])
    assert found == Check("port", "failed", "this check itself failed, KeyError: 'x'")


def test_every_check_answers_in_one_line(tmp_path: Path) -> None:
    found = examine(a_subject(tmp_path))
    assert {check.name for check in found} >= {name for name, _ in CHECKS}
    assert all("\n" not in check.found for check in found)
    json.dumps([check._asdict() for check in found])


def test_eighty_columns() -> None:
    long = "/a/very-long-path/" + "x" * 200 + " 模型模型模型" * 30
    lines = command._lines([Check("state directory", "warning", long, "chmod 700 here"), Check("a", "ok", "")])
    remedy = [line for line in lines if line.strip().startswith("$")]
    assert remedy == ["         $ chmod 700 here"]
    assert all(columns(line) <= WIDTH for line in lines if line not in remedy)
    assert "".join("".join(line[26:] for line in lines[:-2]).split()) == "".join(long.split())
    assert lines[-1] == f"{'ok':9}{'a':17}"


def test_an_interpreter_with_a_space_in_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my python/bin/python")
    remedy = python.broken(MAC, "No module named 'mlx'", PINS).remedy or ""
    assert remedy.startswith("'/my python/bin/python' -m pip install ")


def test_sudo_changes_nothing_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {tmp_path: False, tmp_path / "home": True}
    monkeypatch.setattr(places, "is_ours", lambda path: owners.get(path, False))
    home = tmp_path / "home"
    (home / "theirs").mkdir(parents=True)
    new = shlex.quote(str(tmp_path / "a" / "new"))
    assert places.make_writable(home / "new", home) == f"chmod u+rwx {home}"
    assert places.make_writable(home / "theirs", home) == f'sudo chown -R "$(id -un)" {home / "theirs"}'
    assert places.make_writable(tmp_path / "a" / "new", home) == f'sudo install -d -m 700 -o "$(id -un)" {new}'
    assert places.make_writable(tmp_path, home) is None
    assert places.make_writable(tmp_path, Path("/")) is None
