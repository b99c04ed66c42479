"""`memory://`: batches stay in the process."""

from __future__ import annotations

import pyarrow as pa

from insitu.exporters import Batch, Level, open_exporter
from insitu.exporters.memory import MemoryExporter
from insitu.identity import Source
from insitu.records import schema_of


def test_a_name_is_one_exporter_whose_batches_can_be_read() -> None:
    exporter = open_exporter("memory://test_exporters_memory", Source())
    assert exporter is MemoryExporter.named("test_exporters_memory")
    assert exporter is not MemoryExporter.named("test_exporters_memory/other")
    assert isinstance(exporter, MemoryExporter)
    rows = [{"epoch": 1, "rank": 0, "stage": 0, "row_seq": i, "t_ns": i, "kind": "incident"} for i in range(3)]
    data = pa.RecordBatch.from_pylist(rows, schema=schema_of("events"))
    assert exporter.durable(9) == -1
    assert exporter.export(Batch(1, 0, data, "events")).level is Level.DURABLE
    assert exporter.durable(9) == 0
    exporter.close(0)
    assert [batch.seq for batch in exporter.batches] == [0]
    assert exporter.table("events").column("row_seq").to_pylist() == [0, 1, 2]
    assert exporter.table("gaps").num_rows == 0
    exporter.clear()
    assert exporter.batches == []
