from pathlib import Path
from typing import IO

import pytest

from mlx_launcher.kvcache.files import (
    Entry,
    FolderLock,
    Tensor,
    remove_leftovers,
    set_aside,
    verify,
    write_atomically,
)
from mlx_launcher.models.safetensors import TornFileError, read_header, read_metadata


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "entry.bin"
    path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["entry.bin"]


def test_the_new_file_is_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("os.getpid", lambda: 1)
    (tmp_path / ".partial-1-entry").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        write_atomically(tmp_path / "entry", lambda file: file.write(b"new"))
    assert victim.read_bytes() == b"precious"


def test_tensors_are_written_as_others_read_them_and_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    data = bytes(range(24))
    tensors = [
        Tensor("a", "F32", (2, 3), memoryview(data)),
        Tensor("b", "U8", (0,), memoryview(b"")),
        Tensor("c", "BF16", (1,), memoryview(b"xy")),
    ]
    entry = Entry({"tokens": "1"}, tensors)
    entry.write(path)
    assert entry.size == path.stat().st_size
    assert read_header(path)["c"] == {"dtype": "BF16", "shape": [1], "data_offsets": [24, 26]}
    assert read_metadata(path)["tokens"] == "1"
    verify(path)
    path.write_bytes(path.read_bytes()[:-1] + b"z")
    read_header(path)
    with pytest.raises(TornFileError, match="damaged"):
        verify(path)


def test_what_a_killed_writer_left_is_removed_and_the_rest_kept(tmp_path: Path) -> None:
    (tmp_path / ".partial-99-a").write_bytes(b"half")
    (tmp_path / "a").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]


def test_a_torn_file_is_moved_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    for content in (b"first", b"second"):
        path.write_bytes(content)
        moved = set_aside(path)
        assert not path.exists()
        assert moved.read_bytes() == content


def test_a_folder_is_one_process_s_until_it_lets_go(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "folder")
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path / "folder")
    lock.release()
    FolderLock(tmp_path / "folder").release()
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
