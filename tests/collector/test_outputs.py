"""Files and folders that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_kit import read_only

from insitu_collector.export.outputs import whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, *, folder: bool = False, force: bool = False) -> None:
    with whole(path, folder=folder, force=force) as part:
        (part / "x" if folder else part).write_text("half")
        raise KeyboardInterrupt


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    with whole(tmp_path / "f") as part:
        part.write_text("new")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").read_text() == "new"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, folder: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "f", folder=folder)
    assert names(tmp_path) == []


def test_what_exists_stays_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileExistsError, match="--force"), whole(tmp_path / "f"):
        pass
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "f", force=True)
    assert (tmp_path / "f").read_text() == "old"
    with whole(tmp_path / "f", force=True) as part:
        part.write_text("new")
    assert ((tmp_path / "f").read_text(), names(tmp_path)) == ("new", ["f"])


def test_a_forced_folder_keeps_what_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("kept", "again"):
        (tmp_path / "d" / name).write_text("old")
    with whole(tmp_path / "d", folder=True, force=True) as part:
        (part / "again").write_text("new")
    assert {path.name: path.read_text() for path in (tmp_path / "d").iterdir()} == {"kept": "old", "again": "new"}
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_never_takes_the_place_of_a_folder_nor_the_other_way(tmp_path: Path, folder: bool) -> None:
    if folder:
        (tmp_path / "f").write_text("mine")
    else:
        (tmp_path / "f").mkdir()
    with pytest.raises(FileExistsError, match="already"), whole(tmp_path / "f", folder=folder, force=True):
        pass
    for missing in ("no", "x" * 300):
        with pytest.raises(FileNotFoundError, match="no folder"), whole(tmp_path / missing / "f", folder=folder):
            pass
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_the_disk_refuses_names_the_output_and_the_remedy(folder: bool, tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(OSError) as error, whole(tmp_path / "x", folder=folder) as part:
        part.write_text("never")
    assert error.value.filename == str(tmp_path / "x")
    assert error.value.strerror == "Read-only file system (--out names another place)"
