"""Recovery: what was whole is sealed, what changed is kept aside, what is lost is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segment_recovery import recover_store
from insitu.segments import SegmentName, ShardWriter, TailReader, list_segments

NAME = SegmentName("events", "dead", 0)
COLUMNS = {"epoch": 7, "rank": 0, "stage": 0, "t_ns": 0, "kind": "incident", "text": None}


def events(seq: int) -> Batch:
    rows = [{**COLUMNS, "row_seq": seq}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


@pytest.fixture
def left_open(tmp_path: Path) -> Path:
    """A store whose writer died with three batches in an open file; returns the file."""
    living = ShardWriter(tmp_path / "living", "dead")
    for seq in range(3):
        living.append(events(seq))
    path = NAME.path(tmp_path / "store", "open")
    path.parent.mkdir(parents=True)
    shutil.copy(NAME.path(tmp_path / "living", "open"), path)
    living.close()
    return path


def sealed_seqs(store: Path) -> list[int]:
    seqs: list[int] = []
    for name in list_segments(store, "sealed"):
        with pa.ipc.open_file(name.path(store, "sealed")) as file:
            assert file.num_record_batches > 0
        reader = TailReader(store, name)
        seqs += [batch.seq for batch in reader.read(final=True)]
        assert reader.damage == []
        reader.close()
    return seqs


def test_a_whole_open_file_is_sealed_under_its_own_name(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    recovery = recover_store(store)
    assert (recovery.num_segments, recovery.num_batches, recovery.num_rows) == (1, 3, 3)
    assert (recovery.damage, recovery.unreadable) == ([], [])
    assert list_segments(store, "sealed") == [NAME]
    assert list_segments(store, "open") == []
    assert sealed_seqs(store) == [0, 1, 2]
    assert recover_store(store).num_segments == 0, "a second recovery finds nothing to do"


def test_a_torn_tail_is_counted_and_the_rest_sealed(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    whole = left_open.read_bytes()
    left_open.write_bytes(whole[:-1])
    (damage,) = recover_store(store).damage
    assert (damage.segment, damage.torn, damage.epoch, damage.seq, damage.num_rows) == (NAME, True, 7, 2, 1)
    assert sealed_seqs(store) == [0, 1]
    assert list_segments(store, "quarantine") == [], "nothing in the original that the copy lacks"


def test_a_changed_file_is_kept_in_quarantine_and_its_good_batches_sealed(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    data = bytearray(left_open.read_bytes())
    data[data.index(b"incident")] ^= 1
    left_open.write_bytes(data)
    (damage,) = recover_store(store).damage
    assert (damage.torn, damage.epoch, damage.seq, damage.num_rows) == (False, 7, 0, 1)
    assert sealed_seqs(store) == [1, 2]
    assert NAME.path(store, "quarantine").read_bytes() == bytes(data)
    assert list_segments(store, "open") == []


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 100])
def test_a_file_without_one_whole_batch_goes_away(left_open: Path, tmp_path: Path, num_bytes: int) -> None:
    store = tmp_path / "store"
    left_open.write_bytes(left_open.read_bytes()[:num_bytes])
    recovery = recover_store(store)
    assert recovery.num_batches == 0
    assert list_segments(store, "open") == list_segments(store, "sealed") == []


def test_a_crash_between_footer_and_move_loses_nothing(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copy(NAME.path(tmp_path / "living", "sealed"), left_open)
    assert recover_store(store).damage == []
    assert sealed_seqs(store) == [0, 1, 2]


def test_a_crash_between_copy_and_removal_of_the_original_stores_nothing_twice(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    whole = left_open.read_bytes()
    recover_store(store)
    left_open.write_bytes(whole)
    left_open.with_suffix(".draft").write_bytes(whole[:50])
    recover_store(store)
    assert sealed_seqs(store) == [0, 1, 2]
    assert list(left_open.parent.iterdir()) == []


def test_a_shard_in_use_is_left_alone(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "living")
    writer.append(events(0))
    assert recover_store(tmp_path).num_segments == 0
    assert [name.shard for name in list_segments(tmp_path, "open")] == ["living"]
    writer.close()


def test_a_table_of_a_newer_version_is_left_where_it_lies(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    unknown = SegmentName("dreams", "dead", 1)
    path = unknown.path(store, "open")
    path.parent.mkdir()
    path.write_bytes(b"ARROW1\0\0")
    recovery = recover_store(store)
    assert recovery.unreadable == [unknown]
    assert recovery.num_batches == 3
    assert path.exists()
