"""What each batch of a segment holds, in a few numbers: found once, since a batch that is written never changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]

BOUNDED: Final = (
    *("row_seq", "rank", "stage", "step_id", "site", "t0_ns", "t1_ns", "t_ns", "unix_ns"),
    *("window_start_unix_ns", "window_end_unix_ns"),
)
"""Columns whose least and greatest value are kept."""
MOST_REQUESTS: Final = 64
"""A batch that names more requests is looked at whoever is asked for."""
_NONE: Final = (2**63 - 1, -(2**63))
"""Least and greatest of no value: no bound meets them."""


class Extents:
    """Batches of one segment in stored order: where each lies, whose it is, and between which values its rows are."""

    def __init__(self, schema: pa.Schema) -> None:
        self.columns = tuple(name for name in BOUNDED if name in schema.names)
        self.requests: list[frozenset[str] | None] = []
        """Whom each batch names; None: more than are kept, or the table names nobody."""
        self._names_requests = "request" in schema.names
        self._rows: list[tuple[int, ...]] = []
        self._made: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, offset: int, num_bytes: int, epoch: int, rows: pa.RecordBatch) -> None:
        """Take in the next batch; rows: its columns but for a payload."""
        bounds: list[int] = []
        for name in self.columns:
            low, high, has_null = _bounds(rows.column(name))
            bounds += (low, high, has_null)
        self._rows.append((offset, num_bytes, epoch, rows.num_rows, *bounds))
        self.requests.append(_requests(rows.column("request")) if self._names_requests else None)
        self._made.clear()

    @property
    def offset(self) -> Int64:
        """Where each begins in its file."""
        return self._column(0)

    @property
    def num_bytes(self) -> Int64:
        """How long each is."""
        return self._column(1)

    @property
    def epoch(self) -> NDArray[np.uint64]:
        """Whose each is."""
        found: NDArray[np.uint64] | None = self._made.get("epoch")
        if found is None:
            found = self._made["epoch"] = np.array([row[2] for row in self._rows], np.uint64)
        return found

    def low(self, column: str) -> Int64:
        """Return the least value of a column in each batch; above the greatest where all are null."""
        return self._column(4 + 3 * self.columns.index(column))

    def high(self, column: str) -> Int64:
        """Return the greatest value of a column in each batch."""
        return self._column(5 + 3 * self.columns.index(column))

    def has_null(self, column: str) -> Bools:
        """Return which batches have rows without a value there."""
        found: Bools = self._column(6 + 3 * self.columns.index(column)) != 0
        return found

    def may_have(self, epoch: int, column: str, value: int) -> bool:
        """Return whether any batch at all may have a value there, of one process."""
        if "epochs" not in self._made:
            self._made["epochs"] = frozenset(row[2] for row in self._rows)
        if column not in self._made:
            low, high = self.low(column), self.high(column)
            self._made[column] = (int(low.min(initial=_NONE[0])), int(high.max(initial=_NONE[1])))
        least, most = self._made[column]
        return bool(epoch in self._made["epochs"] and least <= value <= most)

    def all(self) -> Bools:
        """Return a mask that takes every batch."""
        return np.ones(len(self), bool)

    def touching(self, column: str, low: int, high: int) -> Bools:
        """Return which batches may have a value in [low, high] there."""
        found: Bools = (self.high(column) >= low) & (self.low(column) <= high)
        return found

    def naming(self, request: str) -> Bools:
        """Return which batches may name a request."""
        return np.array([names is None or request in names for names in self.requests], bool)

    def _column(self, place: int) -> Int64:
        found: Int64 | None = self._made.get(str(place))
        if found is None:
            found = self._made[str(place)] = np.array([row[place] for row in self._rows], np.int64)
        return found


def _bounds(values: pa.Array) -> tuple[int, int, int]:
    found = pc.min_max(values)
    low, high = found["min"].as_py(), found["max"].as_py()
    if low is None:
        return *_NONE, int(len(values) > 0)
    return int(low), int(high), int(values.null_count > 0)


def _requests(values: pa.Array) -> frozenset[str] | None:
    distinct: Sequence[str | None] = pc.unique(values).to_pylist()
    return frozenset(name for name in distinct if name is not None) if len(distinct) <= MOST_REQUESTS else None
