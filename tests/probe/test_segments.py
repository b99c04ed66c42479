"""Segments: what is appended is read back, whatever happens to the file or its writer."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments import Key, Limits, SegmentName, ShardWriter, TailReader, list_segments


def events(first: int, num_rows: int, *, epoch: int = 7, seq: int = 0) -> Batch:
    rows = [
        {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": first + i, "t_ns": i, "kind": "incident", "text": "é" * i}
        for i in range(num_rows)
    ]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_sync_reports_each_batch_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 3))
    writer.append(events(3, 2, seq=1))
    assert writer.sync().durable == [Key(7, 10 - 1, 0), Key(7, 9, 1)]
    assert writer.sync().durable == []
    writer.close()


def test_an_open_segment_is_read_as_it_grows_and_after_it_is_sealed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0, 3))
    (name,) = list_segments(tmp_path, "open")
    reader = TailReader(tmp_path, name)
    assert [batch.seq for batch in reader.read()] == [0]
    writer.append(events(3, 2, seq=1))
    assert [batch.seq for batch in reader.read()] == [1]
    assert reader.read() == []
    writer.append(events(5, 1, seq=2))
    writer.close()
    assert [batch.data.to_pylist() for batch in reader.read()] == [events(5, 1).data.to_pylist()]
    assert reader.finished
    assert reader.damage == []
    reader.close()


def test_segments_are_sealed_by_age_and_by_idleness(tmp_path: Path) -> None:
    clock = Clock()
    writer = ShardWriter(tmp_path, "shard", limits=Limits(max_age_s=60, max_idle_s=10), clock=clock)
    writer.append(events(0, 1))
    clock.now += 9
    writer.sync()
    assert list_segments(tmp_path, "sealed") == []
    clock.now += 1
    writer.sync()
    assert list_segments(tmp_path, "sealed") == [SegmentName("events", "shard", 0)]
    writer.close()
