"""Rows of the recent past as Arrow tables, each with the stretch of time it covers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.records import schema_of
from insitu_collector.clocks.timeline import Int64, Timeline

MOST_ROWS: Final = 2_000_000
"""Rows kept at most, whatever their age: about 150 MB of intervals."""

PIECE_ROWS: Final = 20_000


@dataclass(frozen=True, slots=True)
class _Chunk:
    rows: pa.Table
    begin: Int64
    end: Int64
    first_ns: int
    last_ns: int


class RecentRows:
    """Rows of one table that begin and end at some time; on one timeline, oldest forgotten first."""

    def __init__(self, table: str, begin: str, end: str, keep_ns: int) -> None:
        self._schema = schema_of(table)
        self._names = begin, end
        self._keep_ns = keep_ns
        self._chunks: deque[_Chunk] = deque()
        self._num_rows = 0
        self.last_ns: int | None = None
        """Latest end of any row, forgotten ones too."""
        self.base_ns: int | None = None
        """A time that never changes, near the first row: what others count from."""

    def add(self, rows: pa.Table, clock: Timeline) -> None:
        """Take in new rows, in any order of arrival."""
        if not rows.num_rows:
            return
        if rows.num_rows > PIECE_ROWS:  # a history read at once: by time, so that it is forgotten by time
            rows = rows.take(pa.array(np.argsort(clock.moved(rows, self._names[0]), kind="stable")))
        for start in range(0, rows.num_rows, PIECE_ROWS):
            self._append(rows.slice(start, PIECE_ROWS), clock)
        while self._chunks and self._is_too_much():
            self._num_rows -= self._chunks.popleft().rows.num_rows

    def _append(self, rows: pa.Table, clock: Timeline) -> None:
        begin, end = (clock.moved(rows, name) for name in self._names)
        chunk = _Chunk(rows, begin, end, int(begin.min()), int(end.max()))
        self._chunks.append(chunk)
        self._num_rows += rows.num_rows
        self.base_ns = chunk.first_ns if self.base_ns is None else self.base_ns
        self.last_ns = max(chunk.last_ns, self.last_ns or chunk.last_ns)

    def _is_too_much(self) -> bool:
        too_old = (self.last_ns or 0) - self._keep_ns
        return self._chunks[0].last_ns < too_old or self._num_rows > MOST_ROWS

    @property
    def since_ns(self) -> int | None:
        """Return the begin of the oldest row still held, or None without any."""
        return min((chunk.first_ns for chunk in self._chunks), default=None)

    def between(self, t0_ns: int, t1_ns: int) -> pa.Table:
        """Return the rows that touch [t0_ns, t1_ns)."""
        found = []
        for chunk in self._chunks:
            if chunk.last_ns > t0_ns and chunk.first_ns < t1_ns:
                inside: NDArray[np.bool_] = (chunk.end > t0_ns) & (chunk.begin < t1_ns)
                found.append(chunk.rows if inside.all() else chunk.rows.filter(pa.array(inside)))
        return pa.concat_tables(found) if found else self._schema.empty_table()
