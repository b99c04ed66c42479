"""What an earlier version stored or sent is read by this one, and this one still writes the same."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any, Final

import make_segments as maker
import pyarrow as pa
import pytest
from edge_rows import EPOCH

from insitu.records import TABLES, TableSpec, lacking, schema_of, spec_by_digest, table_spec
from insitu.segments.shard import SegmentName, TailReader
from insitu.wire.insitu_pb2 import DURABLE, Frame, ToCollector, ToProbe
from insitu_collector.service.frame_check import checked_batch
from insitu_collector.store import open_store

HERE = Path(__file__).parent


SPECS: Final[dict[str, TableSpec]] = maker.golden_specs()
VERSIONS = (b"1.0", b"1.1", b"1.2", b"1.3")
"""Of the files there are, by the number behind their name: the first of a table may be of any."""


def with_nulls(spec: TableSpec) -> list[dict[str, Any]]:
    """Return the rows of a golden file as they are read today: what was added since is null, and rows that
    say nothing are left out."""
    added = dict.fromkeys(schema_of(spec.name).names[len(spec.schema) :])
    return [row | added for row in maker.rows_of(spec) if lacking(spec.name, row) is None]


def test_no_table_changed_its_schema() -> None:
    golden = json.loads((HERE / "digests.json").read_text())
    tables = [name for name in golden if "-" not in name]
    assert tables == list(TABLES), "a stream's number is its table's place: only append"
    assert set(golden) == set(SPECS), "an earlier version is known for ever; a later one has a golden file"
    for name, spec in SPECS.items():
        assert golden[name] == f"{spec.digest:016x}", f"{name}: add nullable columns or a table, change none"
        assert spec_by_digest(spec.digest) == spec


@pytest.mark.parametrize("name", SPECS)
def test_a_stored_segment_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    path = SegmentName(spec.name, maker.SHARD, 0).path(tmp_path, "sealed")
    path.parent.mkdir(parents=True)
    shutil.copyfile(HERE / "segments" / f"{name}.arrow", path)
    reader = TailReader(tmp_path, SegmentName(spec.name, maker.SHARD, 0))
    found = reader.read(final=True)
    reader.close()
    assert reader.damage == []
    expected = maker.batches_of(spec)
    assert [(b.epoch, b.stream, b.seq, b.crc32) for b in found] == [
        (b.epoch, b.stream, b.seq, b.crc32) for b in expected
    ]
    assert open_store(tmp_path).table(spec.name).to_pylist() == with_nulls(spec)


@pytest.mark.parametrize("name", SPECS)
def test_any_arrow_reader_opens_a_stored_segment(name: str) -> None:
    spec = SPECS[name]
    with pa.ipc.open_file(HERE / "segments" / f"{name}.arrow") as file:
        assert file.schema.remove_metadata().equals(spec.schema)
        assert file.schema.metadata[b"insitu.table"] == spec.name.encode()
        number = int(name.partition("-")[2] or 0)
        assert file.schema.metadata[b"insitu.version"] in VERSIONS[number:]
        assert file.read_all().to_pylist() == maker.rows_of(spec)


@pytest.mark.parametrize("name", SPECS)
def test_a_frame_of_any_version_is_taken(name: str) -> None:
    spec = SPECS[name]
    told = [row for row in maker.rows_of(spec) if lacking(spec.name, row) is None]
    rows = pa.RecordBatch.from_pylist(told, schema=spec.schema)
    body = rows.serialize().to_pybytes()
    frame = Frame(
        stream=spec.stream, seq=3, schema=spec.digest, num_rows=rows.num_rows, crc32=zlib.crc32(body), body=body
    )
    batch = checked_batch(EPOCH, frame)
    assert batch.data.to_pylist() == with_nulls(spec) and batch.seq == 3
    assert batch.crc32 == zlib.crc32(batch.body) and (batch.body == body) == (spec == table_spec(spec.name))


def test_messages_have_the_bytes_they_had() -> None:
    for name, data in maker.messages().items():
        assert data == (HERE / "wire" / f"{name}.bin").read_bytes(), f"{name}: the wire may only gain fields"


def test_stored_messages_are_understood() -> None:
    hello = ToCollector.FromString((HERE / "wire/hello.bin").read_bytes()).hello
    assert (hello.protocol, hello.epoch, dict(hello.source)) == (1, EPOCH, {"role": "rank"})
    frame = ToCollector.FromString((HERE / "wire/frame.bin").read_bytes()).frame
    assert checked_batch(EPOCH, frame).data.to_pylist() == maker.rows_of(SPECS["events"])
    ack = ToProbe.FromString((HERE / "wire/ack.bin").read_bytes()).ack
    assert (ack.stream, ack.seq, ack.level, ack.window_bytes) == (9, 5, DURABLE, 1 << 24)
    refusal = ToProbe.FromString((HERE / "wire/refusal.bin").read_bytes()).refusal
    assert (refusal.stream, refusal.seq, refusal.reason, refusal.retry) == (9, 6, "disk_full", True)
