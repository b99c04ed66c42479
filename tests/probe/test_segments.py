"""Segments: what is appended is read back once, batches are durable when sync says so, a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from disk_kit import failing, fill, read_only, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.exporters.base import Batch
from insitu.records import TABLES, schema_of, table_spec
from insitu.segments.recovery import recover_store
from insitu.segments.shard import (
    Key,
    Limits,
    SegmentName,
    ShardLocked,
    ShardWriter,
    StoreFull,
    StoreGone,
    TailReader,
    list_segments,
)

EVENTS = table_spec("events").stream


def events(first: int, num_rows: int, *, seq: int = 0, epoch: int = 7, text: str = "é") -> Batch:
    rows = [
        {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": first + i, "t_ns": i, "kind": "incident", "text": text}
        for i in range(num_rows)
    ]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def empty(table: str) -> Batch:
    return Batch(7, 0, pa.RecordBatch.from_pylist([], schema=schema_of(table)), table)


def read_all(store: Path, table: str = "events") -> list[Batch]:
    batches: list[Batch] = []
    names = sorted({*list_segments(store, "open", table), *list_segments(store, "sealed", table)})
    for name in names:
        reader = TailReader(store, name)
        batches += reader.read(final=True)
        assert reader.damage == []
        reader.close()
    return batches


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def values(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_integer(kind):
        low = 0 if pa.types.is_unsigned_integer(kind) else -(2 ** (kind.bit_width - 1))
        return st.integers(low, low + 2**kind.bit_width - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_large_binary(kind):
        return st.binary(max_size=40)
    if pa.types.is_list(kind):
        return st.lists(st.none() | values(kind.value_type), max_size=3)
    if pa.types.is_struct(kind):
        return st.fixed_dictionaries({field.name: st.none() | values(field.type) for field in kind})
    assert pa.types.is_string(kind), kind
    return st.text(max_size=8)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    spec = table_spec(draw(st.sampled_from(TABLES)))
    num_rows = draw(st.integers(0, 5))
    epoch = draw(st.integers(0, 2**64 - 1))
    columns = [
        pa.array(
            [draw(values(field.type) if not field.nullable else st.none() | values(field.type))] * num_rows, field.type
        )
        for field in spec.schema
    ]
    columns[0] = pa.array([epoch] * num_rows, pa.uint64())
    data = pa.RecordBatch.from_arrays(columns, schema=spec.schema)
    return Batch(epoch, draw(st.integers(0, 2**63)), data, spec.name)


@given(written=st.lists(batches(), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_every_table_comes_back_as_it_was_written(
    written: list[Batch], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("store")
    writer = ShardWriter(store, "shard")
    for batch in written:
        writer.append(batch)
    for when in ("open", "sealed"):
        for table in {batch.table for batch in written}:
            expected = [batch for batch in written if batch.table == table]
            found = read_all(store, table)
            assert [(b.epoch, b.seq, b.crc32) for b in found] == [(b.epoch, b.seq, b.crc32) for b in expected]
            assert [b.body for b in found] == [b.body for b in expected]
        if when == "open":
            assert len(writer.close().durable) == len(written)


def test_sync_reports_each_batch_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 3))
    writer.append(events(3, 2, seq=1))
    assert writer.unsynced_bytes > 0
    assert writer.sync().durable == [Key(7, EVENTS, 0), Key(7, EVENTS, 1)]
    assert writer.unsynced_bytes == 0
    assert writer.sync().durable == []
    writer.append(events(5, 1, seq=2))
    assert writer.close().durable == [Key(7, EVENTS, 2)]
    assert writer.close().durable == []


def test_a_sealed_file_is_a_read_only_arrow_file_that_says_who_wrote_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 3, seq=4))
    writer.close()
    path = SegmentName("events", "shard", 0).path(tmp_path, "sealed")
    assert path == tmp_path / "v1/sealed/events/shard-0000000000.arrow"
    assert path.stat().st_mode & 0o777 == 0o400
    with pa.ipc.open_file(path) as file:
        assert file.schema.remove_metadata().equals(schema_of("events"))
        assert file.schema.metadata[b"insitu.table"] == b"events"
        assert file.schema.metadata[b"insitu.version"] == b"1.3"
        assert b"shard" in file.schema.metadata[b"insitu.writer"]
        data, metadata = file.get_batch_with_custom_metadata(0)
    expected = events(0, 3, seq=4)
    assert data.equals(expected.data)
    assert dict(metadata) == {
        b"epoch": b"7",
        b"stream": str(EVENTS).encode(),
        b"seq": b"4",
        b"crc32": str(expected.crc32).encode(),
    }


@pytest.mark.parametrize("limits", [Limits(max_age_s=10), Limits(max_idle_s=10)], ids=["age", "idle"])
def test_a_segment_is_sealed_by_age_and_by_idleness(tmp_path: Path, limits: Limits) -> None:
    clock = Clock()
    writer = ShardWriter(tmp_path, "shard", limits=limits, clock=clock)
    writer.append(events(0, 1))
    clock.now += 9.9
    writer.sync()
    assert list_segments(tmp_path, "sealed") == []
    clock.now += 0.1
    writer.sync()
    assert list_segments(tmp_path, "sealed") == [SegmentName("events", "shard", 0)]
    writer.append(events(1, 1, seq=1))
    assert list_segments(tmp_path, "open") == [SegmentName("events", "shard", 1)]
    writer.close()


def test_a_segment_is_sealed_by_size_and_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard", limits=Limits(max_bytes=5000))
    for seq in range(3):
        writer.append(events(seq * 10, 10, seq=seq, text="x" * 500))
    assert len(writer.sync().durable) == 3
    assert [name.number for name in list_segments(tmp_path, "sealed")] == [0, 1, 2]
    writer.close()
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(30, 1, seq=3))
    writer.close()
    assert [name.number for name in list_segments(tmp_path, "sealed")] == [0, 1, 2, 3]
    assert [batch.seq for batch in read_all(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("in_place", ["nothing", "a file", "another store"])
def test_a_store_that_is_removed_meanwhile_is_said_in_a_line_and_takes_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_place: str
) -> None:
    store, clock = tmp_path / "store", Clock()
    writer = ShardWriter(store, "a", limits=Limits(max_idle_s=10), clock=clock)
    for table in ("events", "requests", "steps"):
        writer.append(empty(table))
    writer.sync()
    writer.append(events(0, 1, seq=1))
    shutil.rmtree(store)
    if in_place == "a file":
        store.touch()
    elif in_place == "another store":
        ShardWriter(store, "a").close()
    with pytest.raises(StoreGone, match="has gone while it was written"):
        writer.check()
    assert writer.sync().failed == [Key(7, EVENTS, 1)], "what was not durable is not called so"
    clock.now += 10
    for use_reserve in (False, True):
        with pytest.raises(StoreGone):
            writer.append(events(1, 1, seq=2), use_reserve=use_reserve)
    assert (writer.sync().durable, writer.close().durable) == ([], [])
    (line,) = caplog.messages
    assert line.startswith(f"insitu: store {store} has gone while it was written, and its rows with it; nothing more")
    assert not (store / "v1" / "open").exists(), "nothing is made anew"


def test_a_store_that_was_moved_away_and_back_goes_on_and_has_each_row_once(tmp_path: Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    writer = ShardWriter(store, "a")
    writer.append(events(0, 1))
    writer.sync()
    writer.append(events(1, 1, seq=1))
    store.rename(away)
    assert writer.sync().failed == [Key(7, EVENTS, 1)]
    away.rename(store)
    writer.append(events(1, 1, seq=1))
    writer.append(events(2, 1, seq=2))
    writer.close()
    assert sorted(batch.seq for batch in read_all(store)) == [0, 1, 2]


def test_a_writer_whose_store_was_replaced_leaves_the_lock_to_the_next(tmp_path: Path) -> None:
    store = tmp_path / "store"
    old = ShardWriter(store, "a")
    shutil.rmtree(store)
    new = ShardWriter(store, "a")
    old.close()
    with pytest.raises(ShardLocked):
        ShardWriter(store, "a")
    new.append(events(0, 1))
    assert new.close().durable


def test_files_that_cannot_be_synced_are_one_line_for_one_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(empty("events"))
    writer.append(empty("steps"))

    def broken(fd: int) -> None:  # a disk that fails cannot be had here
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        assert len(writer.sync().failed) == 2
    said = "events/a-0000000000.arrow could not be synced (input/output error); a new file is begun"
    assert caplog.messages == [f"insitu: {said} (so it is with 1 more file)"]
    writer.close()


def test_a_batch_with_other_columns_is_refused_before_it_touches_the_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    with pytest.raises(ValueError, match="columns of that table"):
        writer.append(Batch(1, 0, pa.record_batch({"x": [1]}), "events"))
    assert list_segments(tmp_path, "open") == []
    writer.close()


def test_a_shard_has_one_writer_and_a_store_many_shards(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, "one")
    with pytest.raises(ShardLocked, match=f"process {os.getpid()} already writes shard 'one'"):
        ShardWriter(tmp_path, "one")
    second = ShardWriter(tmp_path, "two")
    first.append(events(0, 1, epoch=1))
    second.append(events(0, 1, epoch=2))
    first.close()
    second.close()
    assert {batch.epoch for batch in read_all(tmp_path)} == {1, 2}
    assert [path.name for path in (tmp_path / "v1").iterdir() if path.is_file()] == []
    ShardWriter(tmp_path, "one").close()


def test_a_shard_is_free_again_though_its_last_sync_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 1))
    writer.sync()
    writer.append(events(1, 1, seq=1))
    with failing(monkeypatch), pytest.raises(OSError, match="Input/output error"):
        writer.close()
    assert writer.close().durable == [], "it is closed"
    ShardWriter(tmp_path, "shard").close()
    assert [batch.seq for batch in read_all(tmp_path)] == [0]


def test_a_shard_is_free_again_though_its_store_became_read_only(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 1))
    writer.sync()
    with read_only(tmp_path), pytest.raises(OSError, match=r"[Rr]ead-only"):
        writer.close()
    ShardWriter(tmp_path, "shard").close()
    assert [batch.seq for batch in read_all(tmp_path)] == [0]


def test_a_forked_child_neither_harms_nor_holds_the_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 2))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        del writer  # a child that lets go of what it inherited writes nothing
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    writer.append(events(2, 1, seq=1))
    writer.close()
    ShardWriter(tmp_path, "shard").close()  # the child still runs, and does not hold the lock
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    assert [batch.seq for batch in read_all(tmp_path)] == [0, 1]


def test_row_06_a_failed_sync_reports_its_batches_and_leaves_the_file_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 1))
    writer.sync()
    writer.append(events(1, 1, seq=1))

    def broken(fd: int) -> None:  # a disk that fails cannot be had here
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        done = writer.sync()
    assert (done.durable, done.failed) == ([], [Key(7, EVENTS, 1)])
    writer.append(events(1, 1, seq=1))
    assert writer.sync().durable == [Key(7, EVENTS, 1)]
    assert {name.number for name in list_segments(tmp_path, "open")} == {0, 1}
    writer.close()
    recover_store(tmp_path)
    assert [batch.seq for batch in read_all(tmp_path)] == [0, 1], "what came again is kept once"


def append_until_full(writer: ShardWriter, first_seq: int) -> list[int]:
    """Append batches until there is no room; return the seqs stored, from 0."""
    seq = first_seq
    while True:
        try:
            writer.append(events(seq, 1, seq=seq, text="x" * 20_000))
        except StoreFull:
            return list(range(seq))
        seq += 1


def test_a_full_disk_keeps_what_was_durable_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        writer = ShardWriter(disk / "store", "shard")
        writer.append(Batch(7, 0, events(0, 1).data, "events"))
        stored = append_until_full(writer, first_seq=1)
        assert len(writer.sync().durable) == len(stored)
        assert list_segments(disk / "store", "open") == [], "the reserve made room for the footers"
        assert [batch.seq for batch in read_all(disk / "store")] == stored
        with pytest.raises(StoreFull):
            writer.append(events(99, 1, seq=99))
        writer.close()


def test_a_disk_filled_by_others_is_full_and_frees_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        writer = ShardWriter(disk, "shard")
        writer.append(events(0, 1))
        ballast = fill(disk)
        with pytest.raises(StoreFull):
            writer.append(events(1, 1, seq=1))
        assert writer.sync().durable == [Key(7, EVENTS, 0)]
        with pytest.raises(StoreFull):
            writer.append(events(1, 1, seq=1))
        ballast.unlink()
        writer.append(events(1, 1, seq=1))
        assert writer.close().durable == [Key(7, EVENTS, 1)]
        assert [batch.seq for batch in read_all(disk)] == [0, 1]


def test_there_is_no_writer_on_a_disk_without_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        with pytest.raises(StoreFull):
            ShardWriter(disk, "shard")
        assert [path.name for path in (disk / "v1").glob("*.lock")] == []


TORN = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_segments import events, read_all
from insitu.segments.shard import ShardWriter, StoreFull, list_segments

store = Path(sys.argv[1])
writer = ShardWriter(store, "shard")
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for seq in range(1000):
    try:
        writer.append(events(seq, 1, seq=seq, text="x" * 50_000))
    except StoreFull:
        break
assert len(writer.sync().durable) == seq > 0
assert list_segments(store, "open") != [], "its tail is torn, so it has no footer yet"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.append(events(seq, 1, seq=seq))
assert len(writer.sync().durable) == 1
writer.close()
assert list_segments(store, "open") == []
assert [batch.seq for batch in read_all(store)] == list(range(seq + 1))
"""


def test_row_05_a_short_write_tears_no_batch_that_was_kept(tmp_path: Path) -> None:
    script = [sys.executable, "-c", TORN, str(tmp_path), str(Path(__file__).parent)]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_segments import events
from insitu.segments.shard import ShardWriter

writer = ShardWriter(Path(sys.argv[1]), "shard")
for seq in range(5):
    writer.append(events(seq, 1, seq=seq))
    print(len(writer.sync().durable), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_durable_survives_a_killed_writer(tmp_path: Path) -> None:
    script = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    writer = ShardWriter(tmp_path, "shard")
    assert (writer.recovery.num_segments, writer.recovery.num_rows, writer.recovery.damage) == (1, 5, [])
    assert list_segments(tmp_path, "open") == []
    assert [batch.seq for batch in read_all(tmp_path)] == [0, 1, 2, 3, 4]
    writer.close()
