import os
from pathlib import Path

import pytest

from mlx_launcher.kvcache.files import remove_leftovers, set_aside, write_atomically


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "entry.bin"
    path.write_bytes(b"old")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["entry.bin"]


def test_the_new_file_is_only_for_its_owner_and_its_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    seen: list[Path] = []

    def write(partial: Path) -> None:
        seen.append(partial)
        partial.write_bytes(b"new")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert seen[0].suffix == ".safetensors"


def test_what_a_killed_writer_left_is_removed_and_the_rest_kept(tmp_path: Path) -> None:
    def killed(partial: Path) -> None:
        partial.write_bytes(b"half")
        os.link(partial, partial.with_name(f"{partial.name}-kept-by-the-test"))

    write_atomically(tmp_path / "a", killed)
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]


def test_a_torn_file_is_moved_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    for content in (b"first", b"second"):
        path.write_bytes(content)
        moved = set_aside(path)
        assert not path.exists()
        assert moved.read_bytes() == content
