"""Following the store of a collector: each row once, over as many calls as that takes."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of, with_todays_columns
from insitu.segments.reader import Damage
from insitu.wire.insitu_pb2 import End, Look
from insitu_collector.query.parts import Answer
from insitu_collector.tail import SeenRows

if TYPE_CHECKING:
    from insitu_collector.query.remote import RemoteRows

MARGIN_NS: Final = 60_000_000_000
"""A call that takes another one's place asks for what was written up to so long before the last look."""


class RemoteTail:
    """As `StoreTail`, and raises as `RemoteStore` does: then nothing is lost, and the next poll tries again.

    The collector remembers what it sent as long as a call lasts. Where one breaks off, another goes on from the last
    look, and what comes twice is left out here.
    """

    def __init__(self, rows: RemoteRows, tables: Iterable[str], since_unix_ns: int | None) -> None:
        self.damage: list[Damage] = []
        self.hidden: Counter[tuple[str, int]] = Counter()
        self._rows = rows
        self._tables = [table for table in tables if schema_of(table)]
        self._since_unix_ns = since_unix_ns
        self._call: _Call | None = None
        self._seen = SeenRows()
        self._fresh: dict[str, list[pa.RecordBatch]] = {}
        """What came of a poll that was broken off."""
        self._looked_unix_ns: dict[str, int] = {}
        """When each table was last looked at, on the collector's clock."""

    def poll(self, *, final: bool = False) -> dict[str, pa.Table]:
        """Return the new rows by table; tables without any are left out."""
        for table, rows in self._new(self._tables, final):
            self._fresh.setdefault(table, []).append(rows)
        fresh, self._fresh = self._fresh, {}
        return {table: pa.Table.from_batches(fresh[table]) for table in self._tables if table in fresh}

    def batches(self, table: str, *, final: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield the new rows of one of the tables."""
        assert table in self._tables, f"{table} is none of what this tail follows"
        yield from (rows for _, rows in self._new([table], final))

    def close(self) -> None:
        """End the call."""
        if self._call is not None:
            self._call.close()
            self._call = None

    def _new(self, tables: Iterable[str], final: bool) -> Iterator[tuple[str, pa.RecordBatch]]:
        left = list(tables)
        while left:
            was_there = self._call is not None
            try:
                yield from self._ask(left, final)
            except ConnectionError:
                self.close()
                if not was_there:
                    raise
            except BaseException:
                self.close()  # the rest of an answer would be taken for the next one
                raise

    def _ask(self, left: list[str], final: bool) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield what is new in some tables, and take each off the list once it is answered."""
        if self._call is None:
            self._call = _Call(self._rows, self._since)
        call = self._call
        call.ask(left, final)
        while left:
            table, answer = left[0], call.answer(left[0])
            for batch in answer.batches():
                rows = self._fresh_of(table, batch)
                if rows.num_rows:
                    yield table, rows
            self._note(table, answer.end)
            left.remove(table)

    def _fresh_of(self, table: str, batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = with_todays_columns(batch, schema_of(table))
        if not rows.num_rows:
            return rows
        return self._seen.new_rows(Batch(rows["epoch"][0].as_py(), 0, rows, table))

    def _note(self, table: str, end: End) -> None:
        self._looked_unix_ns[table] = end.begun_unix_ns
        for of, epoch in [key for key in self.hidden if key[0] == table]:
            del self.hidden[of, epoch]
        self.hidden.update({(table, each.epoch): each.num_rows for each in end.hidden})

    @property
    def _since(self) -> int | None:
        """What a new call leaves out: what was asked at first, and what the calls before it have given."""
        if len(self._looked_unix_ns) < len(self._tables):
            return self._since_unix_ns
        given = min(self._looked_unix_ns.values(), default=0) - MARGIN_NS
        return given if self._since_unix_ns is None else max(given, self._since_unix_ns)


class _Call:
    """One call: looks go out together, and are answered in their order."""

    def __init__(self, rows: RemoteRows, since_unix_ns: int | None) -> None:
        self._since_unix_ns = since_unix_ns
        self._looks: queue.SimpleQueue[Look | None] = queue.SimpleQueue()
        self._parts = rows.follow(iter(self._looks.get, None))
        self._schemas: dict[str, pa.Schema] = {}

    def ask(self, tables: Iterable[str], final: bool) -> None:
        for table in tables:
            self._looks.put(Look(table=table, is_final=final, since_unix_ns=self._since_unix_ns))

    def answer(self, table: str) -> Answer:
        """Wait for the answer to the earliest look that has none. Its batches are to be read to their end."""
        answer = Answer(self._parts, self._schemas.get(table))
        self._schemas[table] = answer.schema
        return answer

    def close(self) -> None:
        self._looks.put(None)
        self._parts.close()
