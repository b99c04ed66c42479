"""What each step took on each rank, beside the shape it had. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.rows.tape import Columns

Float64 = NDArray[np.float64]

_BUSY: Final = (IntervalClass.COMPUTE, IntervalClass.HOST, IntervalClass.SAMPLE)
_KNOWN: Final = tuple(IntervalClass)
"""A step with time of a class of a later version is left out: what it spent there, nobody here can say."""
_UNFINISHED: Final = 2
"""Latest steps of a rank that are left out: some of their intervals may not have arrived."""
_REACH_NS: Final = 2_000_000_000
"""How far before the window intervals are read, so that its first steps are whole."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The finished steps of one rank, by begin. All arrays have one entry a step."""

    t_ns: Int64
    step: Int64
    busy_ns: Float64
    """Compute, host and sample; not gc."""
    cpu_ns: Float64
    """The part of it in which the step thread was on a core."""
    gc_ns: Float64
    shape: Float64
    """float64[num_steps, len(SHAPE)]"""
    warmup: NDArray[np.bool_]

    @property
    def off_ns(self) -> Float64:
        """The part of `busy_ns` in which the step thread was on no core."""
        return np.maximum(self.busy_ns - self.cpu_ns, 0.0)

    def __len__(self) -> int:
        return len(self.t_ns)

    def between(self, t0_ns: int, t1_ns: int) -> StepTimes:
        return self.only((self.t_ns >= t0_ns) & (self.t_ns < t1_ns))

    def only(self, wanted: NDArray[np.bool_]) -> StepTimes:
        return StepTimes(*(getattr(self, item.name)[wanted] for item in fields(self)))


def knows_not_all(intervals: Columns) -> bool:
    """Tell whether some intervals are of a class of a later version."""
    return not bool(np.isin(intervals["cls"], _KNOWN).all())


def step_times(evidence: Evidence, t0_ns: int) -> dict[int, StepTimes]:
    """Return, for each rank, the finished steps that began at `t0_ns` or later and whose shape is known."""
    intervals = evidence.intervals.between(t0_ns - _REACH_NS)
    stated = evidence.steps.between(t0_ns - 2 * _REACH_NS)
    stated["warmup"] = evidence.is_warmup(stated)
    order = np.argsort(stated["step"], kind="stable")
    stated = {name: column[order] for name, column in stated.items()}
    found = {}
    for rank in evidence.stages:
        mine = intervals["rank"] == rank
        if mine.any():
            found[rank] = _of_rank({name: column[mine] for name, column in intervals.items()}, stated, t0_ns)
    return found


def _of_rank(intervals: Columns, stated: Columns, t0_ns: int) -> StepTimes:
    busy = np.isin(intervals["cls"], _BUSY)
    collected = intervals["cls"] == IntervalClass.GC
    strange = np.unique(intervals["step"][~np.isin(intervals["cls"], _KNOWN)])
    wanted = (busy | collected) & (intervals["step"] >= 0) & ~np.isin(intervals["step"], strange)
    steps, place = np.unique(intervals["step"][wanted], return_inverse=True)
    ns = (intervals["t"] - intervals["t0"])[wanted]
    begin = np.full(len(steps), np.iinfo(np.int64).max)
    np.minimum.at(begin, place, intervals["t0"][wanted])

    def total(amount: Int64, of: NDArray[np.bool_]) -> Float64:
        return np.bincount(place, amount * of[wanted], len(steps)).astype(np.float64)

    shape_at = np.searchsorted(stated["step"], steps, side="right") - 1
    known = shape_at >= 0
    known[known] &= stated["step"][shape_at[known]] == steps[known]
    shape_at = shape_at[known]
    found = StepTimes(
        begin[known],
        steps[known],
        total(ns, busy)[known],
        np.minimum(total(intervals["cpu"][wanted], busy), total(ns, busy))[known],
        total(ns, collected)[known],
        np.stack([stated[name][shape_at] for name in SHAPE], axis=1),
        stated["warmup"][shape_at],
    )
    return _finished(found, t0_ns)


def _finished(times: StepTimes, t0_ns: int) -> StepTimes:
    order = np.argsort(times.t_ns, kind="stable")[: max(0, len(times) - _UNFINISHED)]
    chosen = order[(times.t_ns[order] >= t0_ns) & (times.busy_ns[order] > 0)]
    return StepTimes(*(getattr(times, item.name)[chosen] for item in fields(times)))
