"""The rank ledger: where each rank's wall time went, exactly one class for each nanosecond of a window. Pure.

How interval classes become ledger classes: docs/verdicts.md, "The rank ledger".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, LedgerClass, Role
from insitu_collector.clocks.timeline import Int64, timeline_of
from insitu_collector.ledger.classes import NOBODY, PLACE
from insitu_collector.ledger.columns import Grid, Sums, Window
from insitu_collector.ledger.rows import (
    beats_of,
    contradicted,
    delays_of,
    grid_of,
    intervals_of,
    joined,
    placed,
    still_open,
)
from insitu_collector.ledger.sweep import tile_sums

Float64 = NDArray[np.float64]

CLASSES: Final = tuple(LedgerClass)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Time of one rank in one class; waits also say whom they wait for (`on_rank`, -1 is the driver)."""

    stage: int
    rank: int
    cls: LedgerClass
    ns: int
    on_rank: int | None = None

    @property
    def seconds(self) -> float:
        return self.ns / 1e9


@dataclass(frozen=True, slots=True)
class Ledger:
    """Rows by stage, rank and class; a rank's rows sum to the window exactly."""

    t0_ns: int
    t1_ns: int
    rows: tuple[LedgerRow, ...]
    overlap_ns: dict[int, int]
    """Rank -> time that more than one interval claimed: counted once in the rows, and wrong at the producer."""
    unattributed_ns: dict[int, int] = field(default_factory=dict)
    """Rank -> the part of `wait_upstream` and `transfer` within the clock error of the split: it may be the other."""

    @property
    def ranks(self) -> list[int]:
        return sorted(self.overlap_ns)

    def ns(self, rank: int, *classes: LedgerClass) -> int:
        """Return a rank's time in some classes (in all, when none is given)."""
        return sum(row.ns for row in self.rows if row.rank == rank and (not classes or row.cls in classes))


def rank_ledger(
    intervals: pa.Table,
    health: pa.Table,
    sources: pa.Table,
    t0_ns: int,
    t1_ns: int,
    clocks: pa.Table | None = None,
) -> Ledger:
    """Return the ledger of [t0_ns, t1_ns), times on the timeline of `sources` and `clocks`.

    Takes tables of one run and replica (`insitu_collector.evidence.groups`). A rank that has a source but no
    intervals is unrecorded all through. An interval still open at a rank's last heartbeat counts up to there.
    """
    if t1_ns < t0_ns:
        raise ValueError(f"a window must not end ({t1_ns}) before it begins ({t0_ns})")
    clock = timeline_of(sources, clocks)
    stages = rank_stages(sources, intervals)
    grid = grid_of(stages, sources, contradicted(intervals, stages, sources, clock))
    beats = beats_of(health, clock)
    rows = placed(intervals_of(intervals, clock), grid)
    opened = placed(still_open(beats), grid)
    last_end = np.full(len(grid.ranks), np.iinfo(np.int64).min)
    np.maximum.at(last_end, rows.rank, rows.end)
    rows = joined([rows, opened.only(opened.begin >= last_end[opened.rank])])
    found = tile_sums(rows, placed(delays_of(beats), grid), grid, Window(t0_ns, t1_ns - t0_ns))
    return ledger_of(found, grid, t0_ns, t1_ns)


def ledger_of(sums: Sums, grid: Grid, t0_ns: int, t1_ns: int) -> Ledger:
    """Return one tile's sums as a ledger."""
    ranks, stages = grid.ranks.tolist(), grid.stages.tolist()
    columns = (column.tolist() for column in (sums.rank, sums.cls, sums.on, sums.ns))
    rows = [
        LedgerRow(stages[rank], ranks[rank], CLASSES[cls], ns, None if on == NOBODY else on)
        for rank, cls, on, ns in zip(*columns, strict=True)
    ]
    rows.sort(key=lambda row: (row.stage, row.rank, PLACE[row.cls], row.on_rank is None, row.on_rank or 0))
    sides = (dict(zip(ranks, each[0].tolist(), strict=True)) for each in (sums.overlap_ns, sums.unattributed_ns))
    return Ledger(t0_ns, t1_ns, tuple(rows), *sides)


def rank_stages(sources: pa.Table, intervals: pa.Table | None = None) -> dict[int, int]:
    """Return rank -> stage of every rank that a source or an interval names, by rank."""
    found: dict[int, int] = {}
    for row in sources.select(["rank", "stage", "role"]).to_pylist():
        if row["role"] == Role.RANK and row["rank"] != NO_RANK:
            found[row["rank"]] = row["stage"]
    if intervals is not None:
        named = intervals.select(["rank", "stage"]).group_by(["rank", "stage"]).aggregate([])
        for row in named.to_pylist():
            if row["rank"] != NO_RANK:
                found.setdefault(row["rank"], row["stage"])
    return dict(sorted(found.items()))


class RunningSum:
    """The running sum of an amount spread evenly over each of some disjoint, sorted stretches."""

    def __init__(self, begin: Int64, end: Int64, amount: Float64) -> None:
        self._zero = int(begin[0]) if len(begin) else 0
        total = np.cumsum(amount)
        self._t = np.stack([begin - self._zero, end - self._zero], axis=1).reshape(-1).astype(np.float64)
        self._sum = np.stack([total - amount, total], axis=1).reshape(-1)

    def __call__(self, t_ns: Int64) -> Float64:
        if not len(self._t):
            return np.zeros(len(t_ns))
        return np.interp((t_ns - self._zero).astype(np.float64), self._t, self._sum)
