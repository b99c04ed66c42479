"""Recovery: what was whole is sealed, what changed is kept aside, what is lost is counted."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.recovery import recover_store
from insitu.segments.shard import Limits, SegmentName, ShardWriter, TailReader, list_segments

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


def test_an_original_that_a_power_loss_cut_takes_nothing_from_its_copy(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    whole = left_open.read_bytes()
    recover_store(store)
    left_open.write_bytes(whole[:-1])  # its unlinking was lost, and the tail, which no sync had been asked for
    recover_store(store)
    assert sealed_seqs(store) == [0, 1, 2]
    assert list(left_open.parent.iterdir()) == []


def test_a_batch_that_came_again_is_kept_once(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    again = SegmentName("events", "dead", 1).path(store, "open")
    again.write_bytes(left_open.read_bytes())
    recover_store(store)
    assert sealed_seqs(store) == [0, 1, 2]


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


WRITES_UNTIL_KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_segment_recovery import events
from insitu.segments.shard import Limits, ShardWriter

writer = ShardWriter(sys.argv[1], "dead", limits=Limits(max_bytes=3000))
seq = int(sys.argv[3])
while True:
    for _ in range(3):
        writer.append(events(seq))
        seq += 1
    done = writer.sync()
    assert not done.failed
    print(done.durable[-1].seq, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_a_writer_killed_at_any_moment_loses_nothing_it_called_durable(tmp_path: Path, seed: int) -> None:
    """Killed while it appends, syncs, writes footers or moves files; each time the next writer goes on behind it."""
    chance = random.Random(seed)
    first = 0
    for _ in range(2):
        script = [sys.executable, "-c", WRITES_UNTIL_KILLED, str(tmp_path), str(Path(__file__).parent), str(first)]
        with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            durable = -1
            for _ in range(chance.randrange(1, 25)):
                durable = int(process.stdout.readline())
            threading.Event().wait(chance.random() * 0.02)
            process.kill()
            durable = max([durable, *(int(line) for line in process.stdout if line.endswith("\n"))])
        writer = ShardWriter(tmp_path, "dead")
        assert list_segments(tmp_path, "open") == []
        writer.close()
        assert all(damage.torn for damage in writer.recovery.damage)
        seqs = sealed_seqs(tmp_path)
        assert len(seqs) == len(set(seqs)), "nothing is stored twice"
        assert set(range(durable + 1)) <= set(seqs)
        first = max(seqs) + 1


def test_recovering_again_and_again_changes_nothing(left_open: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    recover_store(store)
    before = {path: path.stat().st_mtime_ns for path in (store / "v1").rglob("*.arrow")}
    for _ in range(2):
        recover_store(store)
        writer = ShardWriter(store, "dead", limits=Limits())
        writer.close()
    assert {path: path.stat().st_mtime_ns for path in (store / "v1").rglob("*.arrow")} == before
