"""When the rows of a batch were, in Unix time; tables whose rows have no time of their own have none. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.identity import Source

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


def within(batch: Batch, source: Source | None, since_unix_ns: float, until_unix_ns: float) -> pa.RecordBatch:
    """Return the rows of a table with times that began in [since, until)."""
    column = batch.data[_COLUMNS[batch.table][0]].cast(pa.float64())  # exact to a microsecond
    if not _COLUMNS[batch.table][0].endswith("unix_ns"):
        assert source is not None, "times of a process are known by its source"
        since_unix_ns -= source.unix_ns(0)
        until_unix_ns -= source.unix_ns(0)
    return batch.data.filter(pc.and_(pc.greater_equal(column, since_unix_ns), pc.less(column, until_unix_ns)))
