"""Web pages, keys in files, and who may look into the state."""

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from mlx_launcher import system
from mlx_launcher.config.document import Document
from mlx_launcher.config.keyfile import read_key
from mlx_launcher.config.layers import Flags, settle
from mlx_launcher.config.paths import create_state_dir
from mlx_launcher.config.show import rows
from mlx_launcher.errors import LaunchError
from mlx_launcher.host.access import check_key, check_sender
from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.settings import Settings
from mlx_launcher.kvcache.files import FolderLock
from mlx_launcher.supervisor.journal import RotatingFile
from mlx_launcher.supervisor.status import write_state

NOBODY = 65534
OPEN: Settings = {
    "model_path": "",
    "model_id": "m",
    "names": ["m"],
    "accept_any_model": True,
    "api_key": None,
    "require_key": False,
    "max_queue": 1,
    "max_body_bytes": 1,
    "prefill_batch": 1,
    "warmup": [],
    "cache": {"enabled": False, "dir": "", "slots": 1, "min_tokens": 1, "memory_bytes": None, "max_bytes": None},
}
CLOSED: Settings = {**OPEN, "api_key": "right", "require_key": True}
KEY = (b"authorization", b"Bearer right")


def refusal(settings: Settings, *headers: tuple[bytes, bytes]) -> tuple[int, str | None] | None:
    try:
        check_sender(settings, headers)
    except RequestError as error:
        return error.status, error.code
    return None


@pytest.mark.parametrize(
    "host",
    [b"localhost:8081", b"LOCALHOST", b"127.0.0.1:8081", b"127.1.2.3", b"[::1]:9", b"0.0.0.0:8081", b"10.0.0.7:80"],
)
def test_who_names_this_machine_by_an_address_is_no_web_page(host: bytes) -> None:
    assert refusal(OPEN, (b"host", host)) is None
    assert refusal(OPEN, (b"host", host), (b"sec-fetch-mode", b"cors"), (b"user-agent", b"node")) is None
    assert refusal(OPEN, (b"host", host), (b"origin", b"http://" + host), (b"sec-fetch-site", b"same-origin")) is None
    assert refusal(OPEN, (b"host", host), (b"sec-fetch-site", b"none")) is None


def test_without_host_and_origin_it_is_no_browser() -> None:
    assert refusal(OPEN) is None
    assert refusal(OPEN, (b"origin", b"http://localhost:8081")) == (403, "foreign_origin")


@pytest.mark.parametrize(
    "host",
    [
        *[b"evil.example:8081", b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"x", b""],
        *[
            b"evil.example@127.0.0.1",
            b"127.0.0.1/evil",
            b"localhost:8081:1",
            b"[::1",
            b"127.1",
            b"\xff",
            b"localhost,evil",
        ],
    ],
)
def test_a_name_that_is_made_to_lead_here_is_refused(host: bytes) -> None:
    assert refusal(OPEN, (b"host", host)) == (403, "foreign_host")
    assert refusal(OPEN, (b"host", host), (b"origin", b"http://" + host)) == (403, "foreign_host")
    assert refusal(OPEN, (b"host", b"localhost"), (b"host", host)) == (403, "foreign_host")


@pytest.mark.parametrize(
    "origin",
    [
        *[b"https://evil.example", b"http://localhost:3000", b"http://127.0.0.1:8081", b"https://localhost:8081"],
        *[b"null", b"", b"localhost:8081", b"http://localhost:8081, http://evil.example", b"vscode-webview://x"],
    ],
)
def test_another_origin_is_refused(origin: bytes) -> None:
    host = (b"host", b"localhost:8081")
    assert refusal(OPEN, host, (b"origin", origin)) == (403, "foreign_origin")
    assert refusal(CLOSED, host, (b"origin", origin), KEY) == (403, "foreign_origin")
    assert refusal(OPEN, host, (b"origin", b"http://localhost:8081"), (b"origin", origin)) == (403, "foreign_origin")


@pytest.mark.parametrize("site", [b"cross-site", b"same-site", b"anything"])
def test_what_a_page_fetches_without_an_origin_is_refused(site: bytes) -> None:
    assert refusal(OPEN, (b"host", b"localhost:8081"), (b"sec-fetch-site", site)) == (403, "foreign_origin")


def test_where_a_key_is_demanded_another_name_wants_it_for_everything() -> None:
    named = (b"host", b"mac.lan:8081")
    assert refusal(CLOSED, named, KEY) is None
    assert refusal(CLOSED, named) == (401, "invalid_api_key")
    assert refusal(CLOSED, named, (b"authorization", b"Bearer RIGHT")) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "given", [b"", b"Bearer ", b"Bearer", b"right", b"Bearer right ", b"bearer right", b"Bearer \xff"]
)
def test_a_wrong_key_is_refused_and_none_fits_where_none_is_set(given: bytes) -> None:
    without: list[Settings] = [{**CLOSED, "api_key": None}, {**CLOSED, "api_key": ""}]
    for settings in (CLOSED, *without):
        with pytest.raises(RequestError):
            check_key(settings, given)


# -- keys in files


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("sk-planted\n")
    file.chmod(0o600)
    return file


def document(directory: Path, **block: object) -> Document:
    return Document(directory / ".anyclauderc.json", directory, {"backends": {"mlx": {"modelPath": "/m", **block}}}, [])


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_is_read_from_a_file_of_ours(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert read_key(key_file) == "sk-planted"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610])
def test_a_key_file_that_others_can_read_is_refused_with_the_remedy(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(LaunchError) as caught:
        read_key(key_file)
    assert (caught.value.code, caught.value.hint) == ("key_file", f"chmod 600 {key_file}")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"sk-planted\nsk-more", b"\xff\xfe", b"x" * 5000, b"a\0b"]
)
def test_what_is_no_key_is_refused_and_not_shown(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    with pytest.raises(LaunchError, match="holds no key") as caught:
        read_key(key_file)
    assert "planted" not in f"{caught.value.message}{caught.value.hint}"


def test_a_directory_a_fifo_nothing_and_no_path_are_no_key_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "gone", tmp_path / "a\0b"):
        with pytest.raises(LaunchError) as caught:
            read_key(path)
        assert caught.value.code == "key_file"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_another_users_key_file_is_refused(key_file: Path) -> None:
    os.chown(key_file, NOBODY, -1)
    with pytest.raises(LaunchError, match="another user"):
        read_key(key_file)


def test_key_and_key_file_exclude_each_other_and_neither_key_is_shown(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="apiKeyFile") as caught:
        settle(Flags(), {}, document(tmp_path, apiKey="sk-planted", apiKeyFile="key"))
    assert "sk-planted" not in str(caught.value.as_json())
    shown = rows(settle(Flags(), {"MLX_API_KEY": "sk-planted"}, document(tmp_path, apiKeyFile="key")))
    assert shown["apiKeyFile"]["value"] == "key"
    assert "sk-planted" not in str(shown)


# -- the state directory


def test_a_state_directory_of_ours_that_is_open_is_closed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for name in ("8081", "kvcache", "models", "bin"):
        (state / name).mkdir(parents=True)
    for name in ("transformers.json", "transformers.json.17", "mlx-launch-error-x.txt", "service-8081.log"):
        (state / name).touch()
    state.chmod(0o755)
    create_state_dir(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    create_state_dir(tmp_path / "fresh")
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "names"), [(0o755, ["8081", "photos"]), (0o1777, [])])
def test_an_open_directory_that_is_used_for_more_is_refused_and_left_as_it_is(
    tmp_path: Path, mode: int, names: list[str]
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    for name in names:
        (state / name).mkdir()
    state.chmod(mode)
    with pytest.raises(LaunchError, match="others can look into") as caught:
        create_state_dir(state)
    assert f"chmod 700 {state}" in caught.value.hint
    assert stat.S_IMODE(state.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
def test_another_users_state_directory_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, -1)
    with pytest.raises(LaunchError, match="another user"):
        create_state_dir(tmp_path)


@pytest.mark.parametrize("name", ["8081", "kvcache"])
def test_a_link_in_place_of_a_directory_of_the_state_is_refused(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (tmp_path / "victim").mkdir()
    (state / name).symlink_to(tmp_path / "victim")
    with pytest.raises(LaunchError, match="is a link"):
        create_state_dir(state)


# -- links to somebody's file


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("precious")
    return file


def test_a_log_does_not_follow_a_link_in_the_working_directory(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "instance").mkdir()
    monkeypatch.chdir(tmp_path / "instance")
    for path in (Path("log"), tmp_path / "instance" / "log"):
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
        log = RotatingFile(str(path), 100)
        log.write(b"mine")
        assert log.error is not None
    assert victim.read_text() == "precious"
    (tmp_path / "elsewhere").symlink_to(victim)
    RotatingFile(str(tmp_path / "elsewhere"), 100).write(b"!")
    assert victim.read_text() == "precious!"


def test_an_open_log_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text("")
    (tmp_path / "log").chmod(0o644)
    RotatingFile("log", 100).write(b"mine")
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_the_state_file_does_not_follow_a_link(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "instance").mkdir()
    monkeypatch.chdir(tmp_path / "instance")
    Path(".state.json.new").symlink_to(victim)
    assert write_state(None, None, None, {}) is not None
    assert write_state(None, None, None, {}) is None
    Path("state.json").unlink()
    Path("state.json").symlink_to(victim)
    assert write_state(None, None, None, {}) is None
    assert victim.read_text() == "precious"
    assert not Path("state.json").is_symlink()


def test_a_folder_of_the_kv_cache_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="a link is not followed"):
        FolderLock(tmp_path / "folder")
    assert list((tmp_path / "victim").iterdir()) == []


# -- who is at the other end


def test_the_user_at_the_other_end_of_a_socket_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert system.peer_uid(ours) == os.geteuid()
    with socket.socket() as inet:
        assert system.peer_uid(inet) != os.geteuid()


def test_on_macos_it_is_read_from_a_struct_xucred(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connected:
        def getsockopt(self, level: int, name: int, size: int) -> bytes:
            assert (level, name) == (0, 1)  # SOL_LOCAL, LOCAL_PEERCRED
            return struct.pack("=IIhxx16I", 0, 501, 2, 20, 12, *[0] * 14)[:size]

    connected: Any = Connected()
    monkeypatch.setattr("sys.platform", "darwin")
    assert system.peer_uid(connected) == 501
