"""What a session has recorded, in memory: an exporter for tests."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from insitu.exporters.base import Ack, Batch, Level
from insitu.records import schema_of
from insitu.vocabulary import DropReason


class Recording:
    """An exporter that keeps every batch; pass it as `to=`. At once durable."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._durable: dict[int, int] = {}

    def export(self, batch: Batch) -> Ack:
        self.batches.append(batch)
        self._durable[batch.stream] = batch.seq
        return Ack(batch.stream, batch.seq, Level.DURABLE)

    def durable(self, stream: int) -> int:
        return self._durable.get(stream, -1)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        return []

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        return None

    def table(self, name: str) -> pa.Table:
        """Return every row of a table, in the order they were shipped."""
        batches = [batch.data for batch in self.batches if batch.table == name]
        return pa.Table.from_batches(batches, schema_of(name))

    def rows(self, name: str, **where: Any) -> list[dict[str, Any]]:
        """Return the rows of a table whose columns equal `where`."""
        rows: list[dict[str, Any]] = self.table(name).to_pylist()
        return [row for row in rows if all(row[column] == value for column, value in where.items())]
