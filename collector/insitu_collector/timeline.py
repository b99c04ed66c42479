"""One clock for the rows of several hosts, and the way back to Unix time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """CLOCK_MONOTONIC of the first source's host, onto which the other hosts' times are moved.

    Processes with one boot id share one clock and are never moved against each other; other hosts are moved by
    the difference of their Unix anchors, as good as their wall clocks agree.
    """

    unix_minus_mono_ns: int = 0
    offset_ns: Mapping[int, int] = field(default_factory=dict)
    """Epoch -> what to add to a time of that epoch; 0 for an epoch that is not listed."""

    def unix_ns(self, t_ns: int) -> int:
        """Return the Unix time of a time on this line."""
        return int(t_ns) + self.unix_minus_mono_ns

    def moved(self, rows: pa.Table, column: str) -> Int64:
        """Return a time column of `rows` on this line, int64[num_rows]; null becomes 0."""
        t_ns = numbers(rows, column, 0)
        if not any(self.offset_ns.values()) or not len(t_ns):
            return t_ns
        epochs, place = np.unique(np.asarray(rows["epoch"]), return_inverse=True)
        offsets = np.array([self.offset_ns.get(int(epoch), 0) for epoch in epochs], np.int64)
        return t_ns + offsets[place]


def timeline_of(sources: pa.Table) -> Timeline:
    """Return the timeline of a `sources` table; the first row's host gives the clock."""
    rows: list[dict[str, Any]] = sources.to_pylist()
    if not rows:
        return Timeline()
    by_boot: dict[str, int] = {}
    for row in rows:
        by_boot.setdefault(row["boot_id"], row["unix_anchor_ns"] - row["mono_anchor_ns"])
    reference = by_boot[rows[0]["boot_id"]]
    return Timeline(reference, {row["epoch"]: by_boot[row["boot_id"]] - reference for row in rows})


def numbers(rows: pa.Table, column: str, missing: int) -> Int64:
    """Return an integer column as int64[num_rows], nulls replaced by `missing`."""
    values = rows[column]
    if values.null_count:
        values = values.cast(pa.int64()).fill_null(missing)
    return np.asarray(values).astype(np.int64, copy=False)
