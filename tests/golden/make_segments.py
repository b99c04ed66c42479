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
from edge_rows import EPOCH, edge_rows

from insitu.exporters.base import Batch
from insitu.exporters.window import Pending
from insitu.records import TABLES, TableSpec, schema_of, table_spec, versions_of, with_todays_columns
from insitu.segments.shard import SegmentName, ShardWriter
from insitu.wire.insitu_pb2 import DURABLE, Ack, Hello, Refusal, ToCollector, ToProbe

HERE: Final = Path(__file__).parent
SHARD: Final = "golden-1"


def golden_specs() -> dict[str, TableSpec]:
    """Return every minor version of every table by the name of its golden file: `table`, then `table-1`, ..."""
    return {
        f"{table}-{number}" if number else table: spec
        for table in TABLES
        for number, spec in enumerate(sorted(versions_of(table), key=lambda spec: len(spec.schema)))
    }


def rows_of(spec: TableSpec) -> list[dict[str, Any]]:
    """Return the rows of a golden segment."""
    return edge_rows(spec.schema)


def batches_of(spec: TableSpec) -> list[Batch]:
    """Return the two batches of a golden segment, with today's columns: all rows, and none."""
    rows = pa.RecordBatch.from_pylist(rows_of(spec), schema=spec.schema)
    both = [with_todays_columns(each, schema_of(spec.name)) for each in (rows, rows.slice(0, 0))]
    return [Batch(EPOCH, seq, each, spec.name) for seq, each in enumerate(both, 5)]


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
        "frame": ToCollector(frame=Pending.of(batches_of(table_spec("events"))[0]).frame()).SerializeToString(
            deterministic=True
        ),
        "ack": ToProbe(ack=Ack(stream=9, seq=5, level=DURABLE, window_bytes=1 << 24)).SerializeToString(),
        "refusal": ToProbe(refusal=Refusal(stream=9, seq=6, reason="disk_full", retry=True)).SerializeToString(),
    }


def make_segment(name: str, spec: TableSpec) -> None:
    target = HERE / "segments" / f"{name}.arrow"
    if target.exists():
        return
    assert spec == table_spec(spec.name), f"{name}: an earlier version wrote this file, and only it can"
    with tempfile.TemporaryDirectory() as store:
        writer = ShardWriter(store, SHARD)
        for batch in batches_of(spec):
            writer.append(batch)
        writer.close()
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(SegmentName(spec.name, SHARD, 0).path(Path(store), "sealed"), target)


def main() -> None:
    for name, spec in golden_specs().items():
        make_segment(name, spec)
    for name, data in messages().items():
        target = HERE / "wire" / f"{name}.bin"
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.write_bytes(data)
    digests = {name: f"{spec.digest:016x}" for name, spec in golden_specs().items()}
    path = HERE / "digests.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(digests | kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
