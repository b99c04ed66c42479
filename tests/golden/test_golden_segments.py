"""What an earlier version stored or sent is read by this one, and this one still writes the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from insitu.records import TABLES, schema_of, table_spec
from insitu.segments import SegmentName, TailReader
from insitu.wire.insitu_pb2 import DURABLE, ToCollector, ToProbe
from insitu_collector.ingest import checked_batch
from insitu_collector.store import open_store

HERE = Path(__file__).parent


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_segments", HERE / "make_segments.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


def test_no_table_changed_its_schema() -> None:
    golden = json.loads((HERE / "digests.json").read_text())
    assert list(golden) == list(TABLES), "a stream's number is its table's place: only append"
    for table in TABLES:
        assert golden[table] == f"{table_spec(table).digest:016x}", f"{table}: add a table, do not change one"


@pytest.mark.parametrize("table", TABLES)
def test_a_stored_segment_is_read_as_it_was_written(table: str, tmp_path: Path) -> None:
    path = SegmentName(table, maker.SHARD, 0).path(tmp_path, "sealed")
    path.parent.mkdir(parents=True)
    shutil.copyfile(HERE / "segments" / f"{table}.arrow", path)
    reader = TailReader(tmp_path, SegmentName(table, maker.SHARD, 0))
    found = reader.read(final=True)
    reader.close()
    assert reader.damage == []
    expected = maker.batches_of(table)
    assert [(b.epoch, b.stream, b.seq, b.crc32) for b in found] == [
        (b.epoch, b.stream, b.seq, b.crc32) for b in expected
    ]
    assert open_store(tmp_path).table(table).to_pylist() == maker.rows_of(table)


@pytest.mark.parametrize("table", TABLES)
def test_any_arrow_reader_opens_a_stored_segment(table: str) -> None:
    with pa.ipc.open_file(HERE / "segments" / f"{table}.arrow") as file:
        assert file.schema.remove_metadata().equals(schema_of(table))
        assert file.schema.metadata[b"insitu.table"] == table.encode()
        assert file.schema.metadata[b"insitu.version"] == b"1.0"
        assert file.read_all().to_pylist() == maker.rows_of(table)


def test_messages_have_the_bytes_they_had() -> None:
    for name, data in maker.messages().items():
        assert data == (HERE / "wire" / f"{name}.bin").read_bytes(), f"{name}: the wire may only gain fields"


def test_stored_messages_are_understood() -> None:
    hello = ToCollector.FromString((HERE / "wire/hello.bin").read_bytes()).hello
    assert (hello.protocol, hello.epoch, dict(hello.source)) == (1, maker.EPOCH, {"role": "rank"})
    frame = ToCollector.FromString((HERE / "wire/frame.bin").read_bytes()).frame
    assert checked_batch(maker.EPOCH, frame).data.to_pylist() == maker.rows_of("events")
    ack = ToProbe.FromString((HERE / "wire/ack.bin").read_bytes()).ack
    assert (ack.stream, ack.seq, ack.level, ack.window_bytes) == (9, 5, DURABLE, 1 << 24)
    refusal = ToProbe.FromString((HERE / "wire/refusal.bin").read_bytes()).refusal
    assert (refusal.stream, refusal.seq, refusal.reason, refusal.retry) == (9, 6, "disk_full", True)
