"""`STORE/v1/twins/<table>/<shard>-<n>.parquet`: a segment's columns without payloads, for engines that read Parquet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from insitu.records import TABLES
from insitu.segments.erasure import Erased
from insitu.segments.layout import (
    FORMAT,
    QUARANTINE,
    SEALED,
    SegmentName,
    files_in,
    list_segments,
    make_folder,
    sync_folder,
)
from insitu.segments.whole import WholeSegment

TWINS: Final = "twins"
PAYLOADS: Final = ("data", "otlp", "resource", "scope")
"""Columns that stay in the segments."""
GROUP_ROWS: Final = 1 << 16
SEGMENT: Final = "insitu.segment"
"""Metadata of a twin: of which file it is."""


def twin_path(store: Path, name: SegmentName) -> Path:
    return (store / FORMAT / TWINS / name.file).with_suffix(".parquet")


def list_twins(store: Path) -> list[SegmentName]:
    """Return the segments that have a twin, whether they are there or not."""
    return files_in(store, TWINS, ".parquet")


def missing_twins(store: Path) -> list[SegmentName]:
    """Return the sealed segments that have no twin."""
    there = set(list_twins(store))
    return [name for name in list_segments(store, SEALED) if name not in there and name.table in TABLES]


def write_twin(store: Path, name: SegmentName, erased: Erased) -> int:
    """Write the twin of a sealed segment without what is erased; return its bytes.

    It is there whole or not at all. Raises NotWhole for a segment that is damaged, OSError.
    """
    segment = WholeSegment(name.path(store, SEALED), name.table)
    columns = [column for column in segment.schema.names if column not in PAYLOADS]
    schema = pa.schema([segment.schema.field(column) for column in columns])
    metadata = {"insitu.table": name.table, "insitu.version": segment.metadata.get("insitu.version", "")}
    path = twin_path(store, name)
    make_folder(path.parent)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with pq.ParquetWriter(part, schema.with_metadata({**metadata, SEGMENT: name.file}), compression="zstd") as file:
            for rows in _row_groups(segment, name.table, columns, erased):
                file.write_table(rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path.stat().st_size


def _row_groups(segment: WholeSegment, table: str, columns: list[str], erased: Erased) -> Iterator[pa.Table]:
    batches: list[pa.RecordBatch] = []
    for batch in segment.batches():
        batches.append(erased.left(table, batch.key.epoch, batch.data, deep=True).select(columns))
        if sum(b.num_rows for b in batches) >= GROUP_ROWS:
            yield pa.Table.from_batches(batches)
            batches = []
    if batches:
        yield pa.Table.from_batches(batches)


def remove_twin(store: Path, name: SegmentName) -> None:
    """Remove a twin, if there is one."""
    twin_path(store, name).unlink(missing_ok=True)


def quarantined_twin(store: Path, name: SegmentName) -> Path:
    return name.path(store, QUARANTINE).with_suffix(".parquet")


def quarantine_twin(store: Path, name: SegmentName) -> None:
    """Keep the twin of a damaged segment, if there is one, beside where the original is kept. Raises OSError."""
    kept = quarantined_twin(store, name)
    make_folder(kept.parent)
    with contextlib.suppress(FileNotFoundError):
        os.rename(twin_path(store, name), kept)
        sync_folder(kept.parent)


def sweep_twins(store: Path) -> list[SegmentName]:
    """Remove the twins of segments that have gone or were replaced; return them."""
    # Twins first: a segment that is made and gets its twin in between is then not taken for gone.
    twins = list_twins(store)
    orphans = sorted(set(twins) - set(list_segments(store, SEALED)))
    for name in orphans:
        remove_twin(store, name)
    return orphans


def twin_problem(store: Path, name: SegmentName, num_rows: int | None) -> str:
    """Return what is wrong with a twin of a segment with so many rows, or "". Rows that are erased may be missing.

    num_rows: None where that is not known, as of a damaged segment: its twin may well have more.
    """
    try:
        found = pq.ParquetFile(twin_path(store, name))
        with found:
            names, rows = found.schema_arrow.names, found.metadata.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"it cannot be read: {str(error).splitlines()[0]}"
    if any(column in PAYLOADS for column in names):
        return "it holds a payload"
    return f"{rows} rows, of {num_rows}" if num_rows is not None and rows > num_rows else ""
