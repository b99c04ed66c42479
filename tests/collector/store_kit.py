"""Small stores of several sealed segments, and what is read of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from click.testing import CliRunner, Result

from insitu.cli import insitu
from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.layout import SEALED, SegmentName, list_segments
from insitu.segments.shard import ShardWriter
from insitu_collector.store import open_store

EPOCH = 7


def batch(table: str, rows: Sequence[dict[str, Any]], *, seq: int, first: int, epoch: int = EPOCH) -> Batch:
    """Return a batch of rows numbered from `first` on."""
    full = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": first + i, **row} for i, row in enumerate(rows)]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(full, schema=schema_of(table)), table)


def events(seq: int, *, epoch: int = EPOCH, num_rows: int = 3) -> Batch:
    """Return a batch of `events`, one row a nanosecond."""
    first = seq * num_rows
    rows = [{"t_ns": first + i, "kind": "incident", "step_id": first + i} for i in range(num_rows)]
    return batch("events", rows, seq=seq, first=first, epoch=epoch)


def seal(store: Path, *batches: Batch, shard: str = "a", age_s: float = 0.0) -> list[SegmentName]:
    """Write each batch into a sealed segment of its own, last written `age_s` ago; return the segments."""
    made = []
    for each in batches:
        before = set(list_segments(store, SEALED))
        writer = ShardWriter(store, shard)
        writer.append(each)
        writer.close()
        (name,) = set(list_segments(store, SEALED)) - before
        written_ns = time.time_ns() - round(age_s * 1e9)
        os.utime(name.path(store, SEALED), ns=(written_ns, written_ns))
        made.append(name)
    return made


def source(epoch: int, *, anchor_ns: int = 0, **more: Any) -> Batch:
    """Return the row of `sources` of a process whose monotonic clock began `anchor_ns` after 1970."""
    row = {"run": "cafe" * 4, "role": "rank", "boot_id": "b", "unix_anchor_ns": anchor_ns, "mono_anchor_ns": 0, **more}
    return batch("sources", [row], seq=0, first=0, epoch=epoch)


def damage(path: Path, inside: bytes = b"incident") -> None:
    """Flip one bit of a file that is read-only, where it has these bytes for the last time before its footer."""
    path.chmod(0o600)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[data.rindex(inside)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rows_in(store: Path, table: str) -> list[tuple[int, int]]:
    """Return epoch and number of each row that is read, sorted."""
    found = open_store(store).table(table)
    return sorted(zip(found["epoch"].to_pylist(), found["row_seq"].to_pylist(), strict=True))


def run(*words: object) -> Result:
    """Run `insitu store ...`."""
    return CliRunner().invoke(insitu, ["store", *map(str, words)])
