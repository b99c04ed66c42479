"""The rows of a store's tables, batch by batch, of the batches that may be meant: each row once, whatever is sealed,
merged or expires meanwhile, and none that is erased.

A listing may miss a segment that others were merged into while it was made. So all is listed again, after the last
segment was read, until a listing is as the one before: who merges segments publishes the new one before it unlinks
the others, which makes it part of a later listing; rows that were given out already are left out of it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import OPEN, SEALED, SegmentName, list_segments
from insitu_collector.query.extents import Bools, Extents
from insitu_collector.query.pruning import ByCatalog, Pruner, Wanted
from insitu_collector.query.segment import PAYLOAD, Opened, Segment
from insitu_collector.rows.incomplete import IncompleteRows
from insitu_collector.tail import SeenRows

Keep = Callable[[Extents], Bools]
"""Says of each batch whether it may hold what is meant."""
Salvage = Callable[[SegmentName, bool], list[Batch]]
"""Reads what can be read of a damaged segment (is it sealed?), and tells what cannot."""
EVERYTHING: Final = Wanted()
_BROKEN: Final = (ValueError, OSError, pa.ArrowException)


class Scan:
    """Reads the tables of one store. Safe for several threads."""

    def __init__(
        self, store: Path, salvage: Salvage, pruner: Pruner | None = None, incomplete: IncompleteRows | None = None
    ) -> None:
        self.bytes_read = 0
        """From files, so far."""
        self.erased = ErasedFile(store)
        """What no reader is shown. Whoever reads batches past `batches` asks there."""
        self._incomplete = IncompleteRows(str(store)) if incomplete is None else incomplete
        self._store = store
        self._salvage = salvage
        self._pruner: Pruner = pruner or ByCatalog(store)
        self._known: dict[SegmentName, Segment] = {}
        self._lock = threading.RLock()
        """Held while something is found out about a segment, never while a caller has the turn."""

    def batches(
        self,
        table: str,
        keep: Keep = Extents.all,
        wanted: Wanted = EVERYTHING,
        *,
        payload: bool = True,
        hidden: Counter[int] | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches that may hold what is meant, without rows that were in an earlier one or are erased by now.

        payload: read the table's large column; else it is not there, and checksums are those of the rest's bounds.
        hidden: counts the erased rows by epoch. Raises ErasedUnreadable.
        """
        seen = SeenRows()
        payload = payload or table not in PAYLOAD
        for name in self._segments(table):
            for batch in self._read(name, keep, wanted, payload):
                fresh = seen.new_rows(batch)
                rows = self.erased.read().left(table, batch.epoch, fresh)
                if hidden is not None and rows.num_rows < fresh.num_rows:
                    hidden[batch.epoch] += fresh.num_rows - rows.num_rows
                whole = self._incomplete.left(table, batch.epoch, rows)
                if whole.num_rows:
                    yield Batch(batch.epoch, batch.seq, whole, table)
        self._incomplete.tell(table)

    def segment_of(self, table: str, epoch: int, row_seq: int) -> Iterator[tuple[Segment, int]]:
        """Yield the segments that may hold a row, erased or not, each with the place of the batch; they may have gone
        by now."""
        wanted = Wanted(epochs=frozenset((epoch,)))
        for name in self._segments(table):
            try:
                if self._is_left_out(name, wanted):
                    continue
                segment = self._extended(name)
            except FileNotFoundError:
                continue
            with self._lock:
                found = segment.extents.may_have(epoch, "row_seq", row_seq)
                places = np.flatnonzero(_of_row(segment.extents, epoch, row_seq)).tolist() if found else []
            yield from ((segment, place) for place in places)

    def _extended(self, name: SegmentName) -> Segment:
        """Return a segment, known as far as it is written; not opened where that is all of it."""
        known = self._known.get(name)
        if known is not None and known.is_whole:
            return known
        segment, file, _ = self._look(name, Extents.all)
        self._count(file)
        return segment

    def _segments(self, table: str) -> Iterator[SegmentName]:
        """Yield each segment once, as they were written; those too that are there only after others were read."""
        done: set[SegmentName] = set()
        last: set[SegmentName] | None = None
        while (there := self._listing(table)) != last:
            yield from sorted(there - done, key=self._age)
            done |= there
            last = there
        self._forget(table, there)

    def _listing(self, table: str) -> set[SegmentName]:
        # Open before sealed: a segment sealed in between is then seen at least once.
        being_written = list_segments(self._store, OPEN, table)
        return {*being_written, *list_segments(self._store, SEALED, table)}

    def _age(self, name: SegmentName) -> tuple[str, int, int]:
        """Order segments as they were written: one that took the place of others has a high number."""
        try:
            written_ns = name.path(self._store, SEALED).stat().st_mtime_ns
        except FileNotFoundError:  # it is open, or has gone
            written_ns = 1 << 63
        return name.shard, written_ns, name.number

    def _forget(self, table: str, there: set[SegmentName]) -> None:
        with self._lock:
            for name in [name for name in self._known if name.table == table and name not in there]:
                del self._known[name]

    def _read(self, name: SegmentName, keep: Keep, wanted: Wanted, payload: bool) -> Iterator[Batch]:
        if self._is_left_out(name, wanted):
            return
        try:
            segment, file, places = self._look(name, keep)
        except FileNotFoundError:  # it expired, or was merged into one that the next listing has
            return
        try:
            for place in places:
                try:
                    yield segment.batch(file, place) if payload else segment.without_payload(file, place)
                except _BROKEN:
                    segment.is_damaged = True
                    break
        finally:
            self._count(file)
        if segment.is_damaged:
            for batch in self._salvage(name, file.is_sealed):
                yield batch if payload else _light(batch)

    def _is_left_out(self, name: SegmentName, wanted: Wanted) -> bool:
        with self._lock:
            known = self._known.get(name)
        if known is not None and known.is_whole:
            return False  # its extents say it better
        if name.path(self._store, OPEN).exists():
            return False
        return not self._pruner.may_hold(name, wanted)

    def _look(self, name: SegmentName, keep: Keep) -> tuple[Segment, Opened, list[int]]:
        """Return a segment, known as far as it is written, its file, and which batches may hold what is meant.

        Raises FileNotFoundError.
        """
        file = Opened(self._store, name)
        try:
            with self._lock:
                segment = self._known.setdefault(name, Segment(name))
                segment.look(file)
                places = np.flatnonzero(keep(segment.extents)).tolist() if len(segment.extents) else []
        except BaseException:
            file.close()
            raise
        return segment, file, places

    def _count(self, file: Opened) -> None:
        file.close()
        with self._lock:
            self.bytes_read += file.bytes_read


def _of_row(extents: Extents, epoch: int, row_seq: int) -> Bools:
    found: Bools = extents.touching("row_seq", row_seq, row_seq) & (extents.epoch == np.uint64(epoch))
    return found


def _light(batch: Batch) -> Batch:
    return Batch(batch.epoch, batch.seq, batch.data.drop_columns([PAYLOAD[batch.table]]), batch.table)


def light_schema(table: str, *, payload: bool) -> pa.Schema:
    """Return a table's schema, with its payload column or without."""
    schema = schema_of(table)
    if payload or table not in PAYLOAD:
        return schema
    return schema.remove(schema.get_field_index(PAYLOAD[table]))
