"""Row 28 of the failure matrix: probes and collectors of different versions in one hour."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from insitu.exporters.base import Refused
from insitu.records import NEEDED, TABLES, TableSpec, schema_of, table_spec, versions_of
from insitu.segments.shard import ShardWriter
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.store import open_store

TABLE = "statistics"
"""The first table that gained columns."""
GAINED = [table for table in TABLES if len(versions_of(table)) > 1]


def row_of(spec: TableSpec, epoch: int, row_seq: int) -> dict[str, Any]:
    """Return a row with something in every column that holds a number, or must hold something."""
    row: dict[str, Any] = dict.fromkeys(spec.schema.names)
    for field in spec.schema:
        if pa.types.is_integer(field.type):
            row[field.name] = 1
        elif pa.types.is_floating(field.type):
            row[field.name] = 0.5
        elif not field.nullable or field.name in NEEDED[spec.name]:
            row[field.name] = "x"
    return row | {"epoch": epoch, "row_seq": row_seq}


def frame(spec: TableSpec, epoch: int, seq: int) -> Frame:
    """Return what a probe sends whose table is of that version."""
    body = pa.RecordBatch.from_pylist([row_of(spec, epoch, seq)], schema=spec.schema).serialize().to_pybytes()
    crc32 = zlib.crc32(body)
    return Frame(stream=spec.stream, seq=seq, schema=spec.digest, num_rows=1, crc32=crc32, body=body)


@pytest.mark.parametrize("table", GAINED)
def test_row_28_probes_of_every_version_are_read_together(table: str, tmp_path: Path) -> None:
    versions = sorted(versions_of(table), key=lambda spec: len(spec.schema))
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    for seq in range(3):  # in turn, into one open file
        for epoch, spec in enumerate(versions, 1):
            ingest.take(epoch, frame(spec, epoch, seq))
    ingest.close()
    rows = open_store(tmp_path).table(table)
    assert rows.schema.equals(schema_of(table))
    for epoch, spec in enumerate(versions, 1):
        added = dict.fromkeys(schema_of(table).names[len(spec.schema) :])
        found = [row for row in rows.to_pylist() if row["epoch"] == epoch]
        assert found == [row_of(spec, epoch, seq) | added for seq in range(3)]


def test_row_28_a_newer_probe_is_refused_that_table_only_and_for_good(tmp_path: Path) -> None:
    today = table_spec(TABLE)
    newer = replace(today, schema=today.schema.append(pa.field("of_tomorrow", pa.int64())), digest=today.digest + 1)
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    with pytest.raises(Refused, match="update the collector"):
        ingest.take(1, frame(newer, 1, 0))
    ingest.skip(1, newer.stream, 0)
    ingest.take(1, frame(table_spec("summaries"), 1, 0))
    ingest.commit()
    assert ingest.reached(1, newer.stream) == (0, 0), "nothing of it is waited for"
    assert ingest.reached(1, table_spec("summaries").stream) == (0, 0)
    ingest.close()
    assert open_store(tmp_path).table("summaries").num_rows == 1
