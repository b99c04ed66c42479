"""Tables as files for other programs: CSV, Arrow IPC, Parquet; a batch in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.rows.selection import Selection

UNIX_OF: Final = {
    "t0_ns": "t0_unix_ns",
    "t1_ns": "t1_unix_ns",
    "t_ns": "unix_ns",
    "open_since_ns": "open_since_unix_ns",
}
"""Column in CLOCK_MONOTONIC of its host -> the column beside it in Unix time."""


def unix_schema(table: str) -> pa.Schema:
    """Return a table's schema with a Unix column after each monotonic one."""
    fields = []
    for each in schema_of(table):
        fields.append(each)
        if each.name in UNIX_OF:
            fields.append(pa.field(UNIX_OF[each.name], pa.int64()))
    return pa.schema(fields)


def with_unix(batch: pa.RecordBatch, table: str, clock: Timeline, known: pa.Array) -> pa.RecordBatch:
    """Return rows with Unix times beside monotonic ones; null where a row's epoch is not one of the known ones."""
    schema = unix_schema(table)
    if len(schema) == len(batch.schema):
        return batch
    columns = {name: batch[name] for name in batch.schema.names}
    stranger = pc.invert(pc.is_in(batch["epoch"], known))
    for name, unix in UNIX_OF.items():
        if name in columns:
            moved = clock.moved(batch, name) + np.int64(clock.unix_minus_mono_ns)
            absent = pc.or_(stranger, pc.is_null(batch[name]))
            columns[unix] = pa.array(moved, pa.int64(), mask=np.asarray(absent))
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def write_table(chosen: Selection, table: str, path: Path, kind: str) -> int:
    """Write the rows of a table that are meant into a file of a kind of `WRITERS`; return how many there were."""
    known = chosen.sources["epoch"].combine_chunks()
    num_rows = 0
    with WRITERS[kind](path, unix_schema(table)) as write:
        for batch in chosen.scan(table):
            write(with_unix(batch, table, chosen.clock, known))
            num_rows += batch.num_rows
    return num_rows


Write = Callable[[pa.RecordBatch], None]


class _Csv:
    """RFC 4180 with a header; lists and structs are JSON text, bytes are hex digits, null is empty."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = pa.schema([pa.field(each.name, _flat(each.type)) for each in schema])

    def __enter__(self) -> Write:
        import pyarrow.csv

        self._writer = pyarrow.csv.CSVWriter(str(self._path), self._schema)
        return lambda batch: self._writer.write_batch(_flattened(batch, self._schema))

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _flat(kind: pa.DataType) -> pa.DataType:
    return pa.utf8() if pa.types.is_nested(kind) or pa.types.is_large_binary(kind) else kind


def _flattened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for column in batch.columns:
        if pa.types.is_nested(column.type):
            texts = (None if row is None else json.dumps(row, separators=(",", ":")) for row in column.to_pylist())
            columns.append(pa.array(texts, pa.utf8()))
        elif pa.types.is_large_binary(column.type):
            columns.append(pa.array((None if row is None else row.hex() for row in column.to_pylist()), pa.utf8()))
        else:
            columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class _Ipc:
    """The Arrow IPC file format, compressed by zstd."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema

    def __enter__(self) -> Write:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._writer = pa.ipc.new_file(str(self._path), self._schema, options=options)
        return lambda batch: self._writer.write_batch(batch)

    def __exit__(self, *_: object) -> None:
        self._writer.close()


ROW_GROUP: Final = 65_536
"""Rows of a Parquet row group: small ones are slow to read, and what a probe sends at once is small."""


class _Parquet:
    """Parquet, compressed by zstd."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> Write:
        import pyarrow.parquet

        self._writer = pyarrow.parquet.ParquetWriter(str(self._path), self._schema, compression="zstd")
        return self._take

    def _take(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if sum(each.num_rows for each in self._waiting) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema))
        self._waiting = []

    def __exit__(self, failed: object, *_: object) -> None:
        if self._waiting and not failed:
            self._flush()
        self._writer.close()


WRITERS: Final[dict[str, Callable[[Path, pa.Schema], AbstractContextManager[Write]]]] = {
    "csv": _Csv,
    "arrow": _Ipc,
    "parquet": _Parquet,
}
"""What a table may be written as; the name is also the end of the file's name."""
