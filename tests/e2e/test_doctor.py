"""`mlx-launch doctor` as a process of its own: without rights, with few descriptors, beside real and broken servers."""

import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.launched import processes_naming
from support.patient import Patient
from support.unprivileged import drop_capabilities
from support.waiting import until

from mlx_launcher.demo import build_random

DOCTOR = "mlx-launch doctor --json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def usual(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    patient = Patient(tmp_path_factory.mktemp("healthy"), model)
    patient.get_used_to()
    return patient.usual


@pytest.fixture
def patient(tmp_path: Path, model: Path, usual: list[dict[str, Any]]) -> Iterator[Patient]:
    patient = Patient(tmp_path, model)
    patient.usual = usual
    yield patient
    for process in processes_naming(str(patient.home)):
        process.kill()


def one(patient: Patient, name: str, result: str) -> dict[str, Any]:
    """The only finding of a normal user's doctor."""
    (found,) = patient.findings(preexec=drop_capabilities)
    assert (found["name"], found["result"]) == (name, result), found
    return dict(found)


def is_mended_by(patient: Patient, remedy: str) -> None:
    done = patient.run(remedy, drop_capabilities)
    assert done.returncode == 0, done.stderr
    assert patient.findings(preexec=drop_capabilities) == []


def test_a_cache_directory_that_cannot_be_written_to(patient: Patient) -> None:
    cache = patient.state_dir / "kvcache"
    cache.mkdir(mode=0o500)
    found = one(patient, "disk", "warning")
    assert "cannot be written to: the KV cache is not kept" in found["found"]
    is_mended_by(patient, found["remedy"])


def test_a_state_directory_that_cannot_be_used(patient: Patient) -> None:
    patient.state_dir.chmod(0o100)
    found = one(patient, "state directory", "failed")
    assert "mode 0100" in found["found"]
    is_mended_by(patient, found["remedy"])


def test_a_configuration_that_may_not_be_read(patient: Patient) -> None:
    patient.file.chmod(0)
    found = one(patient, "configuration", "failed")
    assert "Permission denied" in found["found"]
    is_mended_by(patient, found["remedy"])


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_model_that_may_not_be_read(mode: int, patient: Patient) -> None:
    patient.model.chmod(mode)
    found = one(patient, "model", "failed")
    assert "Permission denied" in found["found"]
    is_mended_by(patient, found["remedy"])


def test_a_port_for_root_alone(patient: Patient) -> None:
    patient.configure(port=81)
    found = one(patient, "port", "failed")
    assert "no permission for port 81" in found["found"]
    assert found["remedy"] == "mlx-launch start --port=8081"
    patient.configure()
    assert patient.findings(preexec=drop_capabilities) == []


def test_a_home_that_is_not_there(patient: Patient, tmp_path: Path) -> None:
    patient.environment["HOME"] = str(tmp_path / "nowhere")
    tmp_path.chmod(0o500)
    try:
        found = one(patient, "home", "failed")
        assert "nowhere is not there" in found["found"]
        assert found["remedy"].startswith("export ")
        after = patient.findings(f"{found['remedy']}; {DOCTOR}", drop_capabilities)
        # What the remedy sets is well where the state goes; that HOME is not there is still worth a word.
        assert [check["name"] for check in after if check["result"] == "failed"] == []
    finally:
        tmp_path.chmod(0o700)


def test_a_home_that_cannot_be_written_to(patient: Patient) -> None:
    shutil.rmtree(patient.home / ".anyclaude")
    patient.home.chmod(0o500)
    found = one(patient, "home", "failed")
    assert "cannot be written to" in found["found"]
    is_mended_by(patient, found["remedy"])


def test_few_descriptors(patient: Patient) -> None:
    def few() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    (found,) = patient.findings(preexec=few)
    assert (found["name"], found["result"]) == ("open files", "warning")
    assert patient.findings(f"{found['remedy']}; {DOCTOR}", few) == []


def test_an_mlx_without_a_backend(patient: Patient, tmp_path: Path) -> None:
    """What a plain `pip install mlx` on Linux leaves: the extension without the library that it is linked with."""
    import mlx.core

    installed = Path(mlx.core.__file__).parent
    if not (installed / "lib" / "libmlx.so").exists():
        pytest.skip(
            "only Linux wheels keep libmlx.so in a package of its own, which can be missing; this MLX is no such one"
        )
    plain = tmp_path / "plain" / "mlx"
    shutil.copytree(installed, plain, ignore=shutil.ignore_patterns("lib", "include", "share"))
    patient.environment["PYTHONPATH"] = str(plain.parent)
    (found,) = patient.findings()
    assert (found["name"], found["result"]) == ("device", "failed")
    assert "MLX has no backend" in found["found"]
    assert "pip install --force-reinstall --no-deps 'mlx[cpu]==" in found["remedy"]
    # It needs a network; what it does is to put the library there.
    (plain / "lib").symlink_to(installed / "lib")
    assert patient.findings() == []


@pytest.mark.parametrize(
    ("name", "version", "result", "words"),
    [
        ("mlx_textgen", "0.2.2", "failed", "mlx-textgen is 0.2.2, and mlx-launcher wants ==0.2.1"),
        ("outlines", "0.2.3", "failed", "torch"),
        ("uvicorn", "0.53.0", "warning", "uvicorn 0.53.0 instead of"),
    ],
)
def test_packages_that_are_not_the_tested_ones(
    name: str, version: str, result: str, words: str, patient: Patient, tmp_path: Path
) -> None:
    metadata = tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    patient.environment["PYTHONPATH"] = str(tmp_path / "site")
    (found,) = [check for check in patient.findings() if name.replace("_", "-") in check["found"]]
    assert (found["name"], found["result"]) == ("packages", result)
    assert words in found["found"]
    assert " -m pip install " in found["remedy"]
    del patient.environment["PYTHONPATH"]  # what it comes to: the tested version is what is found
    assert patient.findings() == []


def test_beside_a_server_that_runs_and_one_that_was_left(patient: Patient) -> None:
    """All that a real supervisor makes is as the doctor wants it; killed, its script's server is left on the port."""
    script = patient.home / "serve.sh"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} {Path(__file__).parents[1]}/fakes/script.py --port "$2"\n')
    script.chmod(0o755)
    patient.configure({"pythonVenv": sys.prefix}, serverScript=str(script), fallback=None)
    started = patient.run("mlx-launch start")
    assert started.returncode == 0, started.stderr
    assert patient.findings() == []
    supervisor = next(p for p in processes_naming(str(patient.home)) if "mlx_launcher.supervisor" in p.cmdline())
    supervisor.send_signal(signal.SIGSTOP)
    (found,) = patient.findings()
    assert (found["name"], found["result"], found["remedy"]) == ("server", "failed", f"kill -CONT {supervisor.pid}")
    assert patient.run(found["remedy"]).returncode == 0
    until(lambda: patient.findings() == [], 10, "an answer")
    supervisor.kill()
    until(lambda: not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE, 10, "its end")
    (found,) = patient.findings()
    assert (found["name"], found["result"]) == ("leftovers", "failed")
    assert "its supervisor was killed, and its server" in found["found"]
    assert patient.run(found["remedy"]).returncode == 0
    until(lambda: patient.findings() == [], 10, "nothing left")


def test_a_person_reads_it(patient: Patient) -> None:
    patient.state_dir.chmod(0o755)
    done = patient.run("mlx-launch doctor")
    assert done.returncode == 0 or patient.usual
    assert f"$ chmod 700 {patient.state_dir}" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.lstrip().startswith("$"))
    assert "\x1b" not in done.stdout


def test_it_changes_nothing_and_imports_no_mlx(patient: Patient) -> None:
    def everything() -> list[tuple[str, float, int]]:
        files = [patient.home, *sorted(patient.home.rglob("*"))]
        return [(str(file), file.lstat().st_mtime, file.lstat().st_size) for file in files]

    before = everything()
    code = "import sys\nfrom mlx_launcher.cli import main\ntry:\n    main(['doctor'])\nexcept SystemExit:\n    pass\n"
    code += "sys.exit('mlx' in sys.modules or 'pydantic' not in sys.modules)"
    assert patient.run(f'{sys.executable} -c "{code}"').returncode == 0
    assert everything() == before


def test_what_lies_where_nobody_may_look(patient: Patient, tmp_path: Path) -> None:
    """A check that cannot see something says so; it does not break."""
    locked = tmp_path / "locked"
    locked.mkdir()
    patient.configure({"pythonVenv": str(locked / "venv")}, cache={"dir": str(locked / "in" / "cache")})
    locked.chmod(0)
    found = one(patient, "disk", "warning")
    assert f"{locked} cannot be written to" in found["found"]
    is_mended_by(patient, found["remedy"])


def test_a_home_where_nobody_may_look(patient: Patient, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    patient.environment["HOME"] = str(locked / "in")
    patient.environment["MLX_LAUNCH_CONFIG"] = str(patient.file)
    found = one(patient, "home", "failed")
    assert "is not there" in found["found"]


def test_a_configuration_where_nothing_is_yet(patient: Patient, tmp_path: Path) -> None:
    patient.environment["MLX_LAUNCH_CONFIG"] = str(tmp_path / "a" / "b" / ".anyclauderc.json")
    (found,) = patient.findings(preexec=drop_capabilities)
    assert (found["name"], found["result"]) == ("configuration", "failed")
    done = patient.run(found["remedy"], drop_capabilities)
    assert done.returncode == 0, done.stderr
    assert [check["name"] for check in patient.findings() if check["name"] == "configuration"] == []
