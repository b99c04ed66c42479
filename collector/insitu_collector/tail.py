"""Following a store while it is written: each row once, whatever is sealed, merged or expired meanwhile."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import pyarrow as pa

from insitu.records import schema_of
from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import OPEN, SEALED, SegmentName, list_segments
from insitu.segments.reader import FIRST_MESSAGE, PIECE_BYTES, Damage, TailReader
from insitu.segments.stored import newer_text
from insitu.segments.whole import numbers_replaced
from insitu_collector.rows.incomplete import IncompleteRows
from insitu_collector.rows.ranges import Ranges

if TYPE_CHECKING:
    from insitu.exporters.base import Batch

TIME_TABLES: Final = frozenset(
    (
        *("intervals", "steps", "requests", "summaries", "expert_loads", "captures"),
        *("statistics", "plugin_statistics", "sampling", "health"),
        *("spans", "metrics", "logs"),
    )
)
"""Tables whose size follows time. The others say what those rows mean, and are small."""

_log = logging.getLogger("insitu")


class Tail(Protocol):
    """Follows tables of a store while they are written. Not for several threads at once."""

    damage: list[Damage]
    """Everything that could not be read so far; of a collector's store only how much that is: `Store.num_damaged`."""
    hidden: Counter[tuple[str, int]]
    """Rows so far, by table and epoch, that were left out because they are erased."""

    def poll(self, *, final: bool = False) -> dict[str, pa.Table]:
        """Return the new rows by table; tables without any are left out.

        `final`: one look is all there will be, so go past what looks incomplete.
        """
        ...

    def batches(self, table: str, *, final: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield the new rows of one table, of which a few MiB are in memory at a time; otherwise as `poll`."""
        ...

    def close(self) -> None:
        """Let go of every file, or of the call."""
        ...


class StoreTail:
    """Follows tables of a store while they are written. Not for several threads at once.

    A segment that expires meanwhile is read to its end if it was begun, and left out otherwise.
    """

    def __init__(
        self,
        path: Path,
        tables: Iterable[str],
        since_unix_ns: int | None = None,
        told: set[Damage] | None = None,
        skip: Callable[[SegmentName], bool] | None = None,
        incomplete: IncompleteRows | None = None,
    ) -> None:
        """incomplete: counts rows that are left out because they say too little.

        told: damage that was logged; what is found is added to it. skip: sealed segments that are not asked for."""
        self.hidden: Counter[tuple[str, int]] = Counter()
        """Rows so far, by table and epoch, that were left out because they are erased."""
        self._erased = ErasedFile(path)
        self._incomplete = IncompleteRows(str(path)) if incomplete is None else incomplete
        self._skip = skip or (lambda name: False)
        self.damage: list[Damage] = []
        """Everything that could not be read so far."""
        self._told = set() if told is None else told
        self._path = path
        self._since_unix_ns = since_unix_ns
        self._tables = [table for table in tables if schema_of(table)]
        self._reading: dict[SegmentName, TailReader] = {}
        self._finished: set[SegmentName] = set()
        self._seen = SeenRows()

    def poll(self, *, final: bool = False) -> dict[str, pa.Table]:
        """Return the new rows by table; tables without any are left out.

        `final`: one look is all there will be, so go past what looks incomplete.
        """
        rows: dict[str, pa.Table] = {}
        for table in self._tables:
            fresh = list(self.batches(table, final=final))
            if fresh:
                rows[table] = pa.Table.from_batches(fresh, schema=schema_of(table))
        return rows

    def batches(self, table: str, *, final: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield the new rows of one table, of which a few MiB are in memory at a time; otherwise as `poll`."""
        erased = self._erased.read()
        for batch in self._new_batches(table, final):
            fresh = self._seen.new_rows(batch)
            left = erased.left(table, batch.epoch, fresh)
            if left.num_rows < fresh.num_rows:
                self.hidden[table, batch.epoch] += fresh.num_rows - left.num_rows
            whole = self._incomplete.left(table, batch.epoch, left)
            if whole.num_rows:
                yield whole
        self._incomplete.tell(table)

    def close(self) -> None:
        """Let go of every file."""
        for reader in self._reading.values():
            reader.close()
        self._reading.clear()

    def _new_batches(self, table: str, final: bool) -> Iterator[Batch]:
        looked_at: set[SegmentName] = set()
        listed: set[SegmentName] | None = None
        while True:
            # Open before sealed: a segment sealed in between is then seen at least once.
            being_written = set(list_segments(self._path, OPEN, table))
            there = being_written | set(list_segments(self._path, SEALED, table)) | self._reading_of(table)
            due = sorted(there - self._finished - looked_at, key=self._age)
            unwanted = {name for name in due if name not in being_written and self._is_unwanted(name)}
            # What has expired is forgotten: a shard never uses a number twice.
            self._finished -= {name for name in self._finished if name.table == table} - there
            self._finished |= unwanted
            for name in due:
                if name not in unwanted:
                    yield from self.read_segment(name, is_done=name not in being_written, final=final)
            if not final or there == listed:
                return
            # The only look there will be. Another segment may have taken the place of one before it was read; and a
            # listing during which that happens may have neither. So it ends when nothing has come or gone.
            looked_at |= there
            listed = there

    def _age(self, name: SegmentName) -> tuple[str, int, int]:
        """Order segments as they were written: one that took the place of old ones has a high number."""
        begun = self._reading.get(name)
        try:
            written_ns = begun.written_ns if begun else name.path(self._path, SEALED).stat().st_mtime_ns
        except FileNotFoundError:  # it is open
            written_ns = 1 << 63
        return name.shard, written_ns, name.number

    def _is_unwanted(self, name: SegmentName) -> bool:
        if name in self._reading:
            return False
        return self._is_too_old(name) or self._skip(name) or self._is_known(name)

    def _is_known(self, name: SegmentName) -> bool:
        """Tell whether a segment was made of such as have been read."""
        if not self._finished:
            return False
        made_of = numbers_replaced(name.path(self._path, SEALED), name.table)
        return bool(made_of) and all(SegmentName(name.table, name.shard, n) in self._finished for n in made_of)

    def _is_too_old(self, name: SegmentName) -> bool:
        if self._since_unix_ns is None or name.table not in TIME_TABLES:
            return False
        try:
            return name.path(self._path, SEALED).stat().st_mtime_ns < self._since_unix_ns
        except FileNotFoundError:
            return False

    def _reading_of(self, table: str) -> set[SegmentName]:
        return {name for name in self._reading if name.table == table}

    def read_segment(self, name: SegmentName, *, is_done: bool, final: bool) -> Iterator[Batch]:
        """Yield the batches of one segment that are new; is_done: nobody writes it any more. Rows may come twice."""
        try:
            reader = self._reading.get(name) or TailReader(self._path, name)
        except FileNotFoundError:  # moved away or expired between the listing and now
            return
        self._reading[name] = reader
        while batches := reader.read(final=is_done or final, max_bytes=PIECE_BYTES):
            yield from batches
        if reader.newer:
            _log.warning("insitu: %s is left out: %s", name.path(self._path, SEALED), newer_text(reader.newer))
        # The end of a file still being written is not damage, however it looks.
        lost = [damage for damage in reader.damage if is_done or not damage.torn]
        if is_done and reader.finished and reader.good_bytes == FIRST_MESSAGE and not lost:
            lost = [Damage(name, 0, 0, torn=True)]  # who seals a segment has written into it
        for damage in lost:
            self._tell(damage)
        self.damage += lost
        reader.damage.clear()
        if reader.finished:
            self._finished.add(name)
            self._reading.pop(name).close()

    def _tell(self, damage: Damage) -> None:
        if damage not in self._told:
            self._told.add(damage)
            what = f"{damage.num_bytes} bytes at {damage.offset} cannot be read" if damage.num_bytes else "it is empty"
            _log.warning("insitu: %s: %s; its rows are left out", damage.segment.path(self._path, SEALED), what)


class SeenRows:
    """Which rows of which (table, epoch) have been returned."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], Ranges] = {}

    def new_rows(self, batch: Batch) -> pa.RecordBatch:
        """Return the rows of a batch that were never returned before, and remember them."""
        seen = self._rows.setdefault((batch.table, batch.epoch), Ranges())
        numbers = batch.data.column("row_seq").to_numpy()
        runs = _runs(numbers)
        num_distinct = sum(end - start for start, end in runs)
        if num_distinct < len(numbers) or any(seen.overlaps(start, end) for start, end in runs):
            return self._unseen(batch.data, numbers, seen)
        for start, end in runs:
            seen.add(start, end)
        return batch.data

    def _unseen(self, data: pa.RecordBatch, numbers: Any, seen: Ranges) -> pa.RecordBatch:
        keep = []
        for i, number in enumerate(numbers.tolist()):
            if number not in seen:
                keep.append(i)
                seen.add(number, number + 1)
        return data.take(pa.array(keep, pa.int64()))


def _runs(numbers: Any) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers in an array, half-open, in order."""
    if not len(numbers):
        return []
    if numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all()):
        return [(int(numbers[0]), int(numbers[-1]) + 1)]  # nearly every batch
    distinct = np.unique(numbers)
    breaks = np.flatnonzero(np.diff(distinct) != 1)
    firsts = distinct[np.concatenate(([0], breaks + 1))]
    lasts = distinct[np.concatenate((breaks, [len(distinct) - 1]))]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
