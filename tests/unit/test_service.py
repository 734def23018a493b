"""What is written for systemd and launchd, what is read back of it, and what their answers mean."""

import os
import plistlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher.config.document import nothing
from mlx_launcher.config.layers import Flags, settle
from mlx_launcher.errors import LaunchError
from mlx_launcher.service.description import Service, absolute, describe
from mlx_launcher.service.install import Gone, Run, perform, to_install
from mlx_launcher.service.launchd import Launchd
from mlx_launcher.service.look import Installed, outdated
from mlx_launcher.service.manager import Manager, State
from mlx_launcher.service.systemd import Systemd

SYSTEMD = Systemd({"HOME": "/home/me"})
LAUNCHD = Launchd({"HOME": "/Users/me"}, 501)
ANALYZE = shutil.which("systemd-analyze")
DAEMON = next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if Path(path).exists()), None)
NOBODY = 65534
AWKWARD = [
    "--model=/models/with a space",
    "--model=/models/100%n",
    '--model=/models/"quoted"',
    "--model=/models/it's",
    "--model=/models/back\\slash",
    "--model=/models/$HOME and ${HOME}",
    "--model=/models/模型 ünï",
    "--model=a;b",
    ";",
    "--model=\\x41\\n%%",
]


def a_service(*options: str, program: str = "/bin/sh", directory: str = "/", **environment: str) -> Service:
    command = (program, "-m", "mlx_launcher", "--state-dir=/state", "--no-config", "run", "--service", "--port=8081")
    return Service((*command, *options), {"HOME": "/home/me", "PATH": "/bin", **environment}, directory, 75, "/k.env")


@pytest.mark.parametrize("manager", [SYSTEMD, LAUNCHD], ids=lambda manager: str(manager.name))
def test_what_is_written_is_read_back(manager: Manager) -> None:
    written = a_service(*AWKWARD, directory="/with a space/100%", HF_HOME='/a "b" $c %d', PATH="/a b:/c%d")
    text = manager.text(written)
    read = manager.parse(text)
    assert read is not None
    assert read._replace(key_file=written.key_file) == written
    assert manager.text(read) == text
    for broken in ("", "nonsense", "[Service]\nExecStart=/bin/true\n", text.replace("--port=", "--part=")):
        assert manager.parse(broken) is None


@pytest.mark.parametrize("manager", [SYSTEMD, LAUNCHD], ids=lambda manager: str(manager.name))
def test_names(manager: Manager) -> None:
    for port in (1, 8081, 65535):
        assert manager.port(manager.file(port).name) == port
    for name in ("mlx-launch-x.service", "mlx-launch.x.plist", "mlx-launch.service.d", "other.service", ""):
        assert manager.port(name) is None


def test_a_unit_lies_where_systemd_looks() -> None:
    assert str(SYSTEMD.file(8081)) == "/home/me/.config/systemd/user/mlx-launch.service"
    assert str(SYSTEMD.file(9000)) == "/home/me/.config/systemd/user/mlx-launch-9000.service"
    elsewhere = Systemd({"HOME": "/home/me", "XDG_CONFIG_HOME": "/etc/me"})
    assert str(elsewhere.file(8081)) == "/etc/me/systemd/user/mlx-launch.service"
    assert Systemd({"HOME": "/home/me", "XDG_CONFIG_HOME": "relative"}).files() == SYSTEMD.files()
    assert str(LAUNCHD.file(8081)) == "/Users/me/Library/LaunchAgents/mlx-launch.8081.plist"


@pytest.mark.parametrize("sign", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\udcff"])
def test_what_cannot_be_written_is_refused(sign: str) -> None:
    """A line break would begin another line of the unit: another command."""
    path = f"/models/a{sign}ExecStartPre=evil"
    for service in (a_service(f"--model={path}"), a_service(directory=path), a_service(HF_HOME=path)):
        with pytest.raises(LaunchError) as refused:
            SYSTEMD.text(service)
        assert refused.value.code == "unit"
        refused.value.message.encode()


def test_a_plist_that_cannot_be_written_is_refused() -> None:
    for sign in ("\0", "\x1b", "\udcff"):
        with pytest.raises(LaunchError):
            LAUNCHD.text(a_service(f"--model=/models/a{sign}b"))


# The keys of launchd.plist(5) that we use, with the type that each must have.
DOCUMENTED: dict[str, Any] = {
    "Label": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "SoftResourceLimits": dict,
    "Umask": int,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}


def test_the_plist_has_only_what_is_documented() -> None:
    agent = plistlib.loads(LAUNCHD.text(a_service()).encode())
    assert {key: type(value) for key, value in agent.items()} == DOCUMENTED
    assert agent["Label"] == "mlx-launch.8081"
    assert agent["ProcessType"] in ("Background", "Standard", "Adaptive", "Interactive")
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["SoftResourceLimits"] == {"NumberOfFiles": 4096}
    assert all(isinstance(word, str) for word in [*agent["ProgramArguments"], *agent["EnvironmentVariables"].values()])
    assert agent["StandardErrorPath"] == "/state/service-8081.log"
    assert agent["Umask"] == 0o077


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A directory that every user can look into, which pytest's are not."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        (path / "runtime").mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(path / "runtime", NOBODY, NOBODY)
        yield path


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong(for_all: Path) -> None:
    assert ANALYZE is not None

    def verify(text: str) -> tuple[int, str]:
        unit = for_all / "mlx-launch.service"
        unit.write_text(text)
        environment = {"PATH": os.environ["PATH"], "HOME": str(for_all), "XDG_RUNTIME_DIR": str(for_all / "runtime")}
        done = subprocess.run(
            [ANALYZE, "--user", "verify", str(unit)], capture_output=True, text=True, env=environment, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    text = SYSTEMD.text(a_service(*AWKWARD, directory=str(for_all), PATH="/a b:/c%d"))
    assert verify(text) == (0, "")
    assert "Unknown key" in verify(text.replace("OOMPolicy", "OOMPolizei"))[1]


@pytest.mark.skipif(DAEMON is None, reason="systemd is not installed")
def test_systemd_reads_what_was_meant(for_all: Path) -> None:
    """systemd loads the unit without running anything, which it does for everybody but root, and says what it understood."""
    assert DAEMON is not None
    directory = for_all / "with a space 100%"
    directory.mkdir()
    service = a_service(*AWKWARD, directory=str(directory), HF_HOME='/a "b" $c %d \\e')
    units = for_all / "systemd" / "user"
    units.mkdir(parents=True)
    (units / "mlx-launch.service").write_text(SYSTEMD.text(service))
    done = subprocess.run(
        [DAEMON, "--test", "--user", "--unit=mlx-launch.service"],
        capture_output=True,
        text=True,
        timeout=60,
        user=NOBODY if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
        env={
            "HOME": str(for_all),
            "XDG_CONFIG_HOME": str(for_all),
            "XDG_RUNTIME_DIR": str(for_all / "runtime"),
            "LC_ALL": "C.UTF-8",
        },
    )
    _, _, dump = done.stdout.partition("-> Unit mlx-launch.service:")
    dump, _, _ = dump.partition("-> Unit ")
    said = [line.strip().partition(": ")[::2] for line in dump.splitlines()]
    if not dump:
        pytest.skip(f"systemd says nothing here: {done.stdout[-200:]}{done.stderr[-200:]}")

    def values(key: str) -> list[str]:
        return [value for name, value in said if name == key]

    (line,) = values("Command Line")[:1]
    words = [word.replace("\\$", "$").replace("\\`", "`") for word in shlex.split(line)]
    assert [words[0], *(word.replace("$$", "$") for word in words[1:])] == list(service.command)
    assert values("WorkingDirectory") == [str(directory)]
    assert set(values("Environment")) == {f"{name}={value}" for name, value in service.environment.items()}
    assert values("WatchdogSec") == ["30s"]
    assert values("TimeoutStopSec") == ["1min 15s"]
    assert values("OOMPolicy") == ["continue"]
    assert values("UMask") == ["0077"]


def in_force(flags: Flags, **environment: str) -> Any:
    return settle(flags, environment, nothing("/"))


def described(flags: Flags, cwd: str = "/", key_file: str = "", **environment: str) -> Service:
    settings = in_force(flags, **environment)
    return describe(["/python", "-m"], ["--force"], settings, environment, cwd, Path("/state"), key_file)


def test_a_description_stands_by_itself(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    service = described(
        Flags(), str(tmp_path), HOME="/home/me", PATH="/bin", MLX_MODEL_PATH="model", HF_HOME="/hub", HF_TOKEN="secret"
    )
    assert service.command[2:] == ("--state-dir=/state", "--no-config", "run", "--service", "--port=8081", "--force")
    assert (service.port, service.state_dir, service.directory) == (8081, "/state", "/home/me")
    assert service.stop_s >= 2 * 30
    kept = {"HOME": "/home/me", "PATH": "/bin", "HF_HOME": "/hub", "MLX_MODEL_PATH": str(tmp_path / "model")}
    assert service.environment == kept
    assert service.install_words() == [
        "--state-dir=/state",
        "--no-config",
        "service",
        "install",
        "--port=8081",
        "--force",
    ]
    assert absolute("org/name", str(tmp_path)) == "org/name"


def test_a_key_of_the_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as refused:
        described(Flags(), MLX_API_KEY="planted")
    assert refused.value.code == "key_in_environment"
    assert "planted" not in refused.value.message + refused.value.hint
    file = tmp_path / "service.env"
    with pytest.raises(LaunchError):
        described(Flags(), key_file=str(file), MLX_API_KEY="planted")
    file.write_text("OTHER=1\nMLX_API_KEY=planted\n")
    file.chmod(0o600)
    service = described(Flags(), key_file=str(file), MLX_API_KEY="planted")
    assert "planted" not in SYSTEMD.text(service) + LAUNCHD.text(service)
    file.chmod(0o640)
    with pytest.raises(LaunchError, match="others may read it"):
        described(Flags(), key_file=str(file), MLX_API_KEY="planted")


SHOWN = """\
Result=success
ExecMainStatus=0
MainPID=4711
LoadState=loaded
ActiveState=active
UnitFileState=enabled
"""


@pytest.mark.parametrize(
    ("output", "state"),
    [
        (SHOWN, State(True, True, True, 4711, None)),
        (SHOWN.replace("=active", "=activating"), State(True, True, True, 4711, None)),
        (SHOWN.replace("=active", "=inactive").replace("4711", "0"), State(True, True, False, None, None)),
        (
            SHOWN.replace("=active", "=failed").replace("4711", "0").replace("success", "exit-code"),
            State(True, True, False, None, "exit-code, exit status 0"),
        ),
        (
            "LoadState=not-found\nActiveState=inactive\nMainPID=0\nUnitFileState=\nResult=success",
            State(False, False, False, None, None),
        ),
        ("", State(False, False, False, None, None)),
        ("nonsense\n=\n", State(False, False, False, None, None)),
    ],
)
def test_what_systemctl_says(output: str, state: State) -> None:
    assert SYSTEMD.state(0, output) == state


PRINTED = """\
gui/501/mlx-launch.8081 = {
	active count = 1
	path = /Users/me/Library/LaunchAgents/mlx-launch.8081.plist
	type = LaunchAgent
	state = running

	program = /usr/bin/python3
	arguments = {
		/usr/bin/python3
		-P
		pid = 1
	}

	default environment = {
		PATH => /usr/bin:/bin:/usr/sbin:/sbin
	}

	domain = gui/501 [100005]
	runs = 1
	pid = 4711
	immediate reason = speculative
	forks = 0
	last exit code = (never exited)

	properties = keepalive | runatload | inferred program
}
"""


@pytest.mark.parametrize(
    ("code", "output", "state"),
    [
        (0, PRINTED, State(True, True, True, 4711, None)),
        (
            0,
            PRINTED.replace("\tpid = 4711\n", "").replace("(never exited)", "0"),
            State(True, True, False, None, None),
        ),
        (
            0,
            PRINTED.replace("\tpid = 4711\n", "").replace("(never exited)", "78: EX_CONFIG"),
            State(True, True, False, None, "exit status 78: EX_CONFIG"),
        ),
        (
            0,
            PRINTED.replace("\tpid = 4711\n", "\tlast terminating signal = Killed: 9\n"),
            State(True, True, False, None, "ended by Killed: 9"),
        ),
        (113, "Bad request.\nCould not find service\n", State(False, False, False, None, None)),
    ],
)
def test_what_launchctl_says(code: int, output: str, state: State) -> None:
    assert LAUNCHD.state(code, output) == state


@pytest.mark.parametrize("manager", [SYSTEMD, LAUNCHD], ids=lambda manager: str(manager.name))
@pytest.mark.parametrize("written", [True, False])
def test_what_runs_is_ended_before_another_takes_its_place(manager: Manager, written: bool) -> None:
    """Also where its file is gone: launchd loads no second one of a name."""
    service = a_service()._replace(stop_s=600)
    text = manager.text(service) if written else None
    there = Installed(8081, Path("/unit"), text, service if written else None, State(True, False, True, 5, None))
    stop, gone, *_ = to_install(manager, service, there, [], lambda: True)
    assert isinstance(stop, Run)
    assert isinstance(gone, Gone)
    assert stop.argv == manager.stop(8081)[0]
    assert stop.within_s > gone.stop_s
    assert stop.fine == (36 if manager is LAUNCHD else 0)


def test_what_is_still_ending_has_not_failed() -> None:
    perform(LAUNCHD, [Run(["sh", "-c", "exit 36"], fine=36)])
    with pytest.raises(LaunchError, match="exit status 36"):
        perform(SYSTEMD, [Run(["sh", "-c", "exit 36"])])
    with pytest.raises(LaunchError, match="exit status 5"):
        perform(LAUNCHD, [Run(["sh", "-c", "exit 5"], fine=36)])


def test_what_is_outdated() -> None:
    service = a_service()
    text = SYSTEMD.text(service)
    program = service.command[:3]

    def why(text: str) -> str:
        there = Installed(8081, Path("/unit"), text, SYSTEMD.parse(text), None)
        return str(outdated(SYSTEMD, there, program))

    assert why(text) == "None"
    assert "changed by hand" in why(text.replace("WatchdogSec=30", "WatchdogSec=99"))
    assert "another program" in why("[Service]\nExecStart=/bin/other\n")
    assert "another installation: /bin/cat" in why(text.replace("/bin/sh", "/bin/cat"))
    assert "interpreter is gone: /gone/python" in why(text.replace("/bin/sh", "/gone/python"))
