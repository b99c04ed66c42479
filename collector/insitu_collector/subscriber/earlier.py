"""Rows of OTLP by number, for those whose resource or scope stands in a batch that was read before. Never writes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu_collector.store import Store
from insitu_collector.subscriber.passed_on import Shared

MAX_KNOWN: Final = 64
"""Rows that are remembered; each may have a resource and a scope of 1 MiB."""


class Earlier:
    """Looks for rows in a store. A collector keeps what belongs together in a batch, so this is for stores of others.

    What is erased is not found.
    """

    def __init__(self, store: Path) -> None:
        self._store = Store(store)
        self._known: OrderedDict[tuple[str, int, int], Shared | None] = OrderedDict()

    def __call__(self, table: str, epoch: int, row_seq: int) -> Shared | None:
        """Return what a row says; None where it is no more."""
        place = table, epoch, row_seq
        if place not in self._known:
            self._known[place] = self._look(*place)
        self._known.move_to_end(place)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return self._known[place]

    def _look(self, table: str, epoch: int, row_seq: int) -> Shared | None:
        for rows in self._store.scan(table):
            is_it = pc.and_(pc.equal(rows["epoch"], pa.scalar(epoch, pa.uint64())), pc.equal(rows["row_seq"], row_seq))
            for row in rows.filter(is_it).select(Shared._fields).to_pylist():
                return Shared(**row)
        return None
