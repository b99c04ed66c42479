"""Rows without a value that readers need (`insitu.records.NEEDED`): left out, counted, and said."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa

from insitu.records import complete_rows
from insitu_collector.rows.ranges import Ranges

_log = logging.getLogger("insitu")


class IncompleteRows:
    """Those of one store, each counted once however often it is read."""

    def __init__(self, store: str) -> None:
        """store: what people call it."""
        self.num_rows: Counter[str] = Counter()
        """By table."""
        self._store = store
        self._seen: dict[tuple[str, int], Ranges] = {}
        self._told: dict[str, int] = {}

    def left(self, table: str, epoch: int, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return those rows of a process that have every value that is needed."""
        complete = complete_rows(table, rows)
        if complete.num_rows < rows.num_rows:
            there = set(complete["row_seq"].to_pylist())
            self._count(table, epoch, (number for number in rows["row_seq"].to_pylist() if number not in there))
        return complete

    def _count(self, table: str, epoch: int, numbers: Iterable[int]) -> None:
        seen = self._seen.setdefault((table, epoch), Ranges())
        for number in numbers:
            if number not in seen:
                seen.add(number, number + 1)
                self.num_rows[table] += 1

    def tell(self, table: str) -> None:
        """Log how many rows of a table were left out, where they are more than was told."""
        num_rows = self.num_rows[table]
        if num_rows > self._told.get(table, 0):
            self._told[table] = num_rows
            rows = "1 row of {} is" if num_rows == 1 else "{1} rows of {0} are"
            said = rows.format(table, num_rows)
            _log.warning("insitu: %s: %s left out: no value where readers need one", self._store, said)
