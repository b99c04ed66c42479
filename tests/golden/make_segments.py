"""Makes the golden segments and frames: `python tests/golden/make_segments.py`. Only ever for files not there yet.

A golden file is what an earlier version stored; it is never made anew, since every store in the world holds such.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.exporters.window import Pending
from insitu.records import TABLES, schema_of, table_spec
from insitu.segments import SegmentName, ShardWriter
from insitu.wire.insitu_pb2 import DURABLE, Ack, Hello, Refusal, ToCollector, ToProbe

HERE: Final = Path(__file__).parent
EPOCH: Final = 0x0123456789ABCDEF
SHARD: Final = "golden-1"
NUM_ROWS: Final = 3


def value(kind: pa.DataType, row: int) -> Any:
    """Return the value of a nullable column: row 0 plain, row 1 at an edge of the type, row 2 null."""
    if row == 2:
        return None
    if pa.types.is_boolean(kind):
        return row == 0
    if pa.types.is_integer(kind):
        signed = not pa.types.is_unsigned_integer(kind)
        return 40 if row == 0 else 2 ** (kind.bit_width - signed) - 1
    if pa.types.is_floating(kind):
        return 0.5 if row == 0 else float("-inf")
    if pa.types.is_large_binary(kind):
        return b"\x00\x01\xff" if row == 0 else b""
    if pa.types.is_list(kind):
        return [value(kind.value_type, 0), value(kind.value_type, 1)] if row == 0 else []
    if pa.types.is_struct(kind):
        return {field.name: value(field.type, row) for field in kind}
    return "Größe" if row == 0 else ""


def rows_of(table: str) -> list[dict[str, Any]]:
    """Return the rows of a table's golden segment."""
    columns = list(schema_of(table))[4:]
    return [
        {
            "epoch": EPOCH,
            "rank": 1,
            "stage": -1,
            "row_seq": 10 + row,
            **{field.name: value(field.type, row) for field in columns},
        }
        for row in range(NUM_ROWS)
    ]


def batches_of(table: str) -> list[Batch]:
    """Return the two batches of a table's golden segment: all rows, and none."""
    rows = pa.RecordBatch.from_pylist(rows_of(table), schema=schema_of(table))
    return [Batch(EPOCH, 5, rows, table), Batch(EPOCH, 6, rows.slice(0, 0), table)]


def messages() -> dict[str, bytes]:
    """Return one serialised message of each kind, by the name of its golden file."""
    hello = Hello(
        protocol=1,
        epoch=EPOCH,
        source={"role": "rank"},
        schemas=[table_spec("events").digest.to_bytes(8, "big")],
    )
    return {
        "hello": ToCollector(hello=hello).SerializeToString(deterministic=True),
        "frame": ToCollector(frame=Pending.of(batches_of("events")[0]).frame()).SerializeToString(deterministic=True),
        "ack": ToProbe(ack=Ack(stream=9, seq=5, level=DURABLE, window_bytes=1 << 24)).SerializeToString(),
        "refusal": ToProbe(refusal=Refusal(stream=9, seq=6, reason="disk_full", retry=True)).SerializeToString(),
    }


def make_segment(table: str) -> None:
    target = HERE / "segments" / f"{table}.arrow"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as store:
        writer = ShardWriter(store, SHARD)
        for batch in batches_of(table):
            writer.append(batch)
        writer.close()
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(SegmentName(table, SHARD, 0).path(Path(store), "sealed"), target)


def main() -> None:
    for table in TABLES:
        make_segment(table)
    for name, data in messages().items():
        target = HERE / "wire" / f"{name}.bin"
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.write_bytes(data)
    digests = {table: f"{table_spec(table).digest:016x}" for table in TABLES}
    path = HERE / "digests.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(digests | kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
