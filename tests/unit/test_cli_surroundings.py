"""What the surroundings of a command may be like: streams that nobody reads, directories that may not be read, odd options."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_launcher.cli import main
from mlx_launcher.cli.output import App, clean
from mlx_launcher.cli.progress import Progress
from mlx_launcher.config import document, paths
from mlx_launcher.config.layers import Flags, settle

FULL = Path("/dev/full")


class Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def unread() -> int:
    """The writing end of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def started(*arguments: str, out: int = subprocess.PIPE, err: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "mlx_launcher", *arguments], stdout=out, stderr=err, text=True)


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_an_error_has_its_exit_code_whether_it_is_read_or_not(tmp_path: Path, unread: int) -> None:
    nothing_runs = ("--state-dir", str(tmp_path), "status")
    assert started(*nothing_runs, err=unread).wait(60) == 3
    with started(*nothing_runs, "--json", out=unread) as process:
        told = process.communicate(timeout=60)[1]
    assert (process.returncode, told.count("\n")) == (3, 1)
    os.close(unread)


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full, which stands for a full disk, is Linux's; macOS has none")
def test_an_error_has_its_exit_code_on_a_full_disk_too(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        assert started("--state-dir", str(tmp_path), "status", err=full.fileno()).wait(60) == 3


def test_progress_that_cannot_be_written_stops_nothing() -> None:
    with Progress(Full(), quiet=False) as progress:
        progress.show("importing")
        progress.show("loading")


def test_a_state_directory_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / ("long" * 100)):
        for command in ("status", "stop", "logs", "restart", "metrics"):
            for which in ((), ("--port", "8081")):
                code, out, err = typed(capsys, "--state-dir", str(place), "--json", command, *which)
                assert code == 1
                assert json.loads(out)["errors"][0]["code"] == "state_dir"
                assert "cannot be read" in err


def test_a_home_that_is_relative_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "somewhere")
    monkeypatch.chdir(tmp_path)
    assert paths.default_state_dir() == tmp_path / "somewhere" / ".anyclaude" / "mlx-launch"
    assert document.home_directory() == tmp_path / "somewhere"


def test_a_name_too_long_for_a_file_is_no_directory(tmp_path: Path) -> None:
    settings = settle(Flags(), {"MLX_MODEL": "m" * 300}, document.nothing(str(tmp_path)))
    assert settings.model_key(str(tmp_path)) is None


@pytest.mark.parametrize("group", ["cache", "config", "service", "cluster"])
def test_json_may_stand_between_a_command_and_its_own_command(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, group, "--json", "nothing")
    assert (code, json.loads(out)["errors"][0]["message"]) == (2, "No such command 'nothing'.")


@pytest.mark.parametrize("command", ["start", "stop"])
@pytest.mark.parametrize("seconds", ["nan", "inf", "1e300", "-1", "soon"])
def test_a_timeout_is_a_number_of_seconds(command: str, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = typed(capsys, command, f"--timeout={seconds}")
    assert code == 2
    assert "Invalid value for '--timeout'" in err


def test_what_is_called_by_a_relative_path_can_be_typed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx-launch").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["./mlx-launch"])
    assert App([]).typed("stop", 8081) == f"{tmp_path}/mlx-launch stop"


def test_a_path_with_two_spaces_can_be_copied() -> None:
    assert clean("chmod 600 '/a  b/c'\n") == "chmod 600 '/a  b/c'"
    assert clean(" first\n   second \t third") == "first second third"


def test_a_service_that_cannot_be_asked_about_is_not_said_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    where = ("--no-config", "--state-dir", str(tmp_path / "state"), "service")
    assert typed(capsys, *where, "install", "--no-start", "--demo")[0] == 0
    code, _, err = typed(capsys, *where, "status")
    assert (code, "cannot be asked whether" in err, "not running" in err) == (3, True, False)


def test_a_log_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run = ("--no-config", "--state-dir", str(tmp_path / "state"), "run", "--demo", "--log-file")
    for path, what in ((tmp_path, f"{tmp_path} is a directory"), (tmp_path / "file" / "log", "file is no directory")):
        code, out, err = typed(capsys, *run, str(path))
        assert (code, out) == (2, "")
        assert f"--log-file: {tmp_path}" in err
        assert what in err
    assert not (tmp_path / "state").exists()
