"""When the rows of a batch were, in Unix time; tables whose rows have no time of their own have none. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.identity import Source
from insitu.segments.shared_bytes import kept_of

_COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "intervals": ("t0_ns", "t1_ns"),
    "steps": ("t0_ns", "t0_ns"),
    "requests": ("t_ns", "t_ns"),
    "health": ("t_ns", "t_ns"),
    "events": ("t_ns", "t_ns"),
    "verdicts": ("detected_unix_ns", "detected_unix_ns"),
    "incidents": ("trigger_unix_ns", "trigger_unix_ns"),
    "spans": ("unix_ns", "unix_ns"),
    "metrics": ("unix_ns", "unix_ns"),
    "logs": ("unix_ns", "unix_ns"),
}
"""Table -> columns of when a row began and ended."""
FOR_EVER: Final = 1 << 62
"""Ns, from 1970 to either side: no row is beyond."""
MAX_KNOWN: Final = 4096
"""Batches of steps of a process whose time is remembered."""


def window_of(batch: Batch, source: Source | None) -> tuple[int, int] | None:
    """Return when the first row of a batch began and the last ended; None where its rows do not say."""
    columns = _COLUMNS.get(batch.table)
    if columns is None or not batch.num_rows:
        return None
    first, last = pc.min(batch.data[columns[0]]).as_py(), pc.max(batch.data[columns[1]]).as_py()
    if first is None or last is None:
        return None
    if columns[0].endswith("unix_ns"):
        return first, last
    return None if source is None else (source.unix_ns(first), source.unix_ns(last))


def has_time(table: str) -> bool:
    """Return whether rows of a table say when they were."""
    return table in _COLUMNS


def within(batch: Batch, source: Source | None, since_unix_ns: int, until_unix_ns: int) -> pa.RecordBatch:
    """Return the rows of a table with times that began in [since, until); bounds are within `FOR_EVER`.

    A row that does not say when it was is in no window.
    """
    column = _COLUMNS[batch.table][0]
    if not column.endswith("unix_ns"):
        assert source is not None, "times of a process are known by its source"
        since_unix_ns, until_unix_ns = since_unix_ns - source.unix_ns(0), until_unix_ns - source.unix_ns(0)
    at = batch.data[column]
    is_within = pc.and_(pc.greater_equal(at, since_unix_ns), pc.less(at, until_unix_ns))
    return kept_of(batch.data, pc.fill_null(is_within, False))


class StepTimes:
    """About when rows were that tell their step alone: as of the step, by what `steps` said of the last ones."""

    def __init__(self) -> None:
        self._began: dict[int, list[tuple[int, int]]] = {}
        """By epoch: first step of a batch, and its Unix time; in order."""

    def learn(self, batch: Batch, source: Source) -> None:
        """Take in rows of `steps`."""
        first = batch.data.slice(0, 1).select(["step_id", "t0_ns"]).to_pylist()
        known = self._began.setdefault(batch.epoch, [])
        for row in first:
            insort(known, (row["step_id"], source.unix_ns(row["t0_ns"])))
        del known[:-MAX_KNOWN]

    def of(self, batch: Batch) -> int | None:
        """Return about when the first row of a batch was; None where no step before it is known."""
        known = self._began.get(batch.epoch)
        if not known or not batch.num_rows or "step_id" not in batch.data.schema.names:
            return None
        place = bisect_right(known, (batch.data["step_id"][0].as_py(), FOR_EVER))
        return known[max(0, place - 1)][1]
