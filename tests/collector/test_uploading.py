"""`insitu store export`: every sealed segment and twin is there, compared; what failed half-way goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from store_kit import batch, damage, events, rows_in, run, seal

from insitu.segments.layout import QUARANTINE, SEALED, list_segments
from insitu_collector.keeping.uploading import CannotExport, Uploader
from insitu_collector.store import open_store


def copies(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def exported(store: Path, to: Path) -> dict[str, Any]:
    found = run("export", store, to.as_uri(), "--json")
    assert found.exit_code in (0, 5), found.output
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def test_segments_and_twins_are_copied_once_with_a_manifest(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there" / "deep"
    seal(store, *(events(n) for n in range(3)))
    run("compact", store)
    answer = exported(store, to)
    assert answer["copied"] == ["sealed/events/a-0000000003.arrow", "twins/events/a-0000000003.parquet"]
    assert copies(to) == {*answer["copied"], "manifest.json"}
    manifest = json.loads((to / "manifest.json").read_text())
    assert manifest["schema"] == "insitu.store-manifest/1"
    assert {row["name"] for row in manifest["files"]} == set(answer["copied"])
    again = exported(store, to)
    assert (again["copied"], again["there"]) == ([], 2)
    (to / "v1").symlink_to(to)
    assert len(open_store(to).table("events")) == 9, "a copy is a store"


def test_what_was_merged_since_takes_the_place_of_its_inputs_there(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there"
    seal(store, *(events(n) for n in range(3)))
    assert len(exported(store, to)["copied"]) == 3
    run("compact", store)
    seal(store, events(3))
    run("compact", store)  # merges the merged one again, before it was ever copied
    answer = exported(store, to)
    assert len(answer["removed"]) == 3
    assert {name for name in copies(to) if name.endswith("arrow")} == {
        f"sealed/{name.file}" for name in list_segments(store, SEALED)
    }


def test_what_is_erased_leaves_the_copies_with_the_next_export(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there"
    seal(store, batch("captures", [{"request": "mine"}, {"request": "other"}], seq=0, first=0))
    run("compact", store)
    exported(store, to)
    run("erase", store, "--request", "mine", "--yes")
    held_back = exported(store, to)
    assert list(held_back["left_out"]) == ["captures/a-0000000000.arrow"]
    run("compact", store)
    exported(store, to)
    assert not any(b"mine" in path.read_bytes() for path in to.rglob("*") if path.is_file())


def test_what_has_expired_here_stays_there(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there"
    seal(store, events(0), age_s=100)
    exported(store, to)
    run("expire", store, "--keep-for", "50s")
    assert rows_in(store, "events") == []
    exported(store, to)
    assert "sealed/events/a-0000000000.arrow" in copies(to)


def test_a_damaged_segment_is_left_out_and_said(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there"
    (name,) = seal(store, events(0))
    damage(name.path(store, SEALED), b"ARROW1\0\0")
    found = run("export", store, to.as_uri())
    assert found.exit_code == 5 and name.file in found.output
    assert list_segments(store, QUARANTINE) == []


def test_a_segment_that_was_damaged_since_does_not_take_the_place_of_its_good_copy(tmp_path: Path) -> None:
    store, to = tmp_path / "store", tmp_path / "there"
    names = seal(store, events(0), events(1))
    exported(store, to)
    copy = to / "sealed" / names[0].file
    good = copy.read_bytes()
    damage(names[0].path(store, SEALED))
    for manifest in ("kept", "lost"):
        if manifest == "lost":
            (to / "manifest.json").unlink()
        found = run("export", store, to.as_uri())
        assert found.exit_code == 5
        assert f"{names[0].file}: left out: damaged (at byte " in found.output
        assert copy.read_bytes() == good
    assert (to / "sealed" / names[1].file).exists()


def test_another_stores_segment_of_the_same_name_is_not_written_over(tmp_path: Path) -> None:
    to = tmp_path / "there"
    (name,) = seal(tmp_path / "one", events(0))
    seal(tmp_path / "two", events(1))
    exported(tmp_path / "one", to)
    good = (to / "sealed" / name.file).read_bytes()
    found = run("export", tmp_path / "two", to.as_uri())
    assert found.exit_code == 5 and f"{name.file}: left out: another one of this name" in found.output
    assert (to / "sealed" / name.file).read_bytes() == good


class Failing(pafs.FileSystemHandler):  # type: ignore[misc]
    """A file system in a folder that fails at the n-th file it is to write, or changes what it is given."""

    def __init__(self, folder: Path, fail_at: int = -1, *, corrupt: bool = False) -> None:
        self._inner = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
        self._left = fail_at
        self._corrupt = corrupt

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)

    def get_type_name(self) -> str:
        return "failing"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._inner.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._inner.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._inner.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        if self._left == 0:
            raise OSError(111, "connection refused")
        self._left -= 1
        self._inner.create_dir(path.rpartition("/")[0] or ".", recursive=True)
        stream = self._inner.open_output_stream(path, metadata=metadata)
        if self._corrupt:
            stream.write(b"?")
        return stream

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


def place(folder: Path, **how: Any) -> tuple[pafs.FileSystem, str]:
    folder.mkdir(exist_ok=True)
    return pafs.PyFileSystem(Failing(folder, **how)), "copy"


@pytest.mark.parametrize("fail_at", range(5))
def test_whatever_write_fails_the_next_run_goes_on_and_all_is_there(tmp_path: Path, fail_at: int) -> None:
    store, there = tmp_path / "store", tmp_path / "there"
    seal(store, *(events(n) for n in range(4)))
    with pytest.raises(CannotExport, match=r"cannot export to fake://x: .*connection refused.*run the same again"):
        Uploader(store, "fake://x", place(there, fail_at=fail_at)).run()
    done = Uploader(store, "fake://x", place(there)).run()
    assert len(done.copied) + done.num_there == 4
    assert len([name for name in copies(there) if name.endswith(".arrow")]) == 4


def test_a_copy_that_is_not_what_was_copied_is_taken_back_and_said(tmp_path: Path) -> None:
    seal(tmp_path / "store", events(0))
    with pytest.raises(CannotExport, match="is not what was copied"):
        Uploader(tmp_path / "store", "fake://x", place(tmp_path / "there", corrupt=True)).run()
    assert not [name for name in copies(tmp_path / "there") if name.endswith(".arrow")]


def test_a_place_that_is_none_is_one_line(tmp_path: Path) -> None:
    seal(tmp_path, events(0))
    found = run("export", tmp_path, "nothing://x")
    assert found.exit_code == 1 and "is no place to export to" in found.output
