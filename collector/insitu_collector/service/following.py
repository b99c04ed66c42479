"""What is new of a store for one caller, a look at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.wire.insitu_pb2 import Look, Part
from insitu_collector.query.asked import EVERY_RUN, Asked
from insitu_collector.query.parts import Counted, end_of, parts_of
from insitu_collector.query.rows import ABOUT_RUNS, Question, Rows
from insitu_collector.store import Store
from insitu_collector.tail import Tail


class Following:
    """Follows one store. Between two looks nothing is read, and nothing is held but which rows were sent."""

    def __init__(self, store: Store, tenant: str) -> None:
        """tenant: whose rows are shown; empty: all there are."""
        self._store = store
        self._of_tenant = _OfTenant(store, tenant) if tenant else None
        self._tail: Tail | None = None
        self._described: set[str] = set()
        """Tables whose schema was sent."""

    def answer(self, look: Look) -> Iterator[Part]:
        """Yield the messages that answer a look. Raises KeyError for an unknown table, ErasedUnreadable."""
        begun_unix_ns, schema = time.time_ns(), schema_of(look.table)
        if self._tail is None:
            since = look.since_unix_ns if look.HasField("since_unix_ns") else None
            self._tail = self._store.tail((), since)
        counted = Counted(self._new(self._tail, look))
        parts = parts_of(schema, counted)
        described = next(parts)
        if look.table not in self._described:
            self._described.add(look.table)
            yield described
        yield from parts
        hidden = {
            epoch: num
            for (table, epoch), num in self._tail.hidden.items()
            if table == look.table and (self._of_tenant is None or self._of_tenant.shows(epoch))
        }
        yield end_of(counted.num_rows, self._store.num_damaged, hidden, begun_unix_ns)

    def close(self) -> None:
        """Let go of every file."""
        if self._tail is not None:
            self._tail.close()

    def _new(self, tail: Tail, look: Look) -> Iterator[pa.RecordBatch]:
        for rows in tail.batches(look.table, final=look.is_final):
            mine = rows if self._of_tenant is None else self._of_tenant.meant(look.table, rows)
            if mine.num_rows:
                yield mine


class _OfTenant:
    """Tells which rows a tenant sees. What a process says of itself is stored before any other row of it."""

    def __init__(self, store: Store, tenant: str) -> None:
        self._store = store
        self._tenant = tenant
        self._rows: Rows = store.reading(tenant)
        self._others: set[int] = set()
        """Epochs of which it is known that they are somebody else's."""

    def meant(self, table: str, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return those of some rows of one process that the tenant sees."""
        epoch = rows["epoch"][0].as_py()
        if table in ABOUT_RUNS or (epoch not in self._others and not self.shows(epoch)):
            self._rows = self._store.reading(self._tenant)  # of a run that began since, perhaps
            if not self.shows(epoch):
                self._others.add(epoch)
        return Question(self._rows, table, Asked(run=EVERY_RUN)).meant(Batch(epoch, 0, rows, table))

    def shows(self, epoch: int) -> bool:
        """Return whether all rows of a process are the tenant's."""
        return self._rows.directory.shows(epoch)
