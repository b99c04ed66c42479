"""`memory://NAME`: batches stay in the process, for tests and for looking at once."""

from __future__ import annotations

import threading
from typing import ClassVar

import pyarrow as pa

from insitu.exporters.base import Ack, Batch, Level
from insitu.records import schema_of
from insitu.vocabulary import DropReason


class MemoryExporter:
    """Keeps every batch in order of arrival; what it has taken counts as durable."""

    _by_name: ClassVar[dict[str, MemoryExporter]] = {}
    _registry_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: list[Batch] = []
        self._durable: dict[int, int] = {}

    @classmethod
    def named(cls, name: str) -> MemoryExporter:
        """Return the exporter of this name, the same one each time in a process."""
        with cls._registry_lock:
            return cls._by_name.setdefault(name, cls())

    @property
    def batches(self) -> list[Batch]:
        """Every batch so far."""
        with self._lock:
            return list(self._batches)

    def table(self, name: str) -> pa.Table:
        """Return all rows of a table so far, in order of arrival."""
        batches = [batch.data for batch in self.batches if batch.table == name]
        return pa.Table.from_batches(batches, schema=schema_of(name))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._batches.clear()
            self._durable.clear()

    def export(self, batch: Batch) -> Ack:
        with self._lock:
            self._batches.append(batch)
            self._durable[batch.stream] = max(batch.seq, self._durable.get(batch.stream, -1))
        return Ack(batch.stream, batch.seq, Level.DURABLE)

    def durable(self, stream: int) -> int:
        with self._lock:
            return self._durable.get(stream, -1)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        return []

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        """Nothing to let go of: the batches stay readable."""
