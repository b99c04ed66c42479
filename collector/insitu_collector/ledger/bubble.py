"""The bubble: how much of its time with work each stage waited, beside what its shape makes unavoidable. Pure.

The floor is that of GPipe (Huang et al. 2019, section 2.3): with S equal stages and M micro-batches in flight a stage
is without one for (S-1)/(S-1+M) of the time. Unequal stages and transfers add to it, so an excess says where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from insitu.vocabulary import NO_RANK, IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.ledger.window import Ledger

_WAITED: Final = (LedgerClass.WAIT_UPSTREAM, LedgerClass.WAIT_DOWNSTREAM, LedgerClass.TRANSFER)
_WITHOUT_WORK: Final = (LedgerClass.NO_DEMAND, LedgerClass.UNRECORDED)
"""Not time with work, as far as anybody knows."""
_FLIGHT: Final = (IntervalClass.COMPUTE, IntervalClass.HOST, IntervalClass.SAMPLE)


@dataclass(frozen=True, slots=True)
class Bubble:
    """One stage, all its ranks together."""

    stage: int
    waited_ns: int
    """Upstream, downstream and in transfer."""
    demand_ns: int
    """Recorded time in which there was work somewhere."""
    in_flight: float | None
    """Micro-batches in flight, the mean over the time in which any was; None where none is on record."""
    floor: float | None
    """The share that the pipeline's shape costs; None without `in_flight`."""

    @property
    def share(self) -> float | None:
        return self.waited_ns / self.demand_ns if self.demand_ns else None

    @property
    def excess(self) -> float | None:
        """How much more is waited than the floor; below 0 where the stage waits less than equal stages would."""
        return None if self.share is None or self.floor is None else self.share - self.floor

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "waited_share": self.share,
            "floor": self.floor,
            "excess": self.excess,
            "in_flight": self.in_flight,
            "demand_seconds": self.demand_ns / 1e9,
        }


def floor_of(num_stages: int, in_flight: float) -> float:
    """Return (S-1)/(S-1+M): the share of its time that each of S equal stages is without a micro-batch."""
    return (num_stages - 1) / (num_stages - 1 + in_flight)


def bubbles(ledger: Ledger, in_flight: float | None) -> tuple[Bubble, ...]:
    """Return the bubble of each stage that a ledger names."""
    ranks: dict[int, set[int]] = {}
    for row in ledger.rows:
        ranks.setdefault(row.stage, set()).add(row.rank)
    floor = None if in_flight is None else floor_of(len(ranks), in_flight)
    window_ns = ledger.t1_ns - ledger.t0_ns
    found = []
    for stage in sorted(ranks):
        waited = sum(ledger.ns(rank, *_WAITED) for rank in ranks[stage])
        idle = sum(ledger.ns(rank, *_WITHOUT_WORK) for rank in ranks[stage])
        found.append(Bubble(stage, waited, window_ns * len(ranks[stage]) - idle, in_flight, floor))
    return tuple(found)


def mean_in_flight(intervals: pa.Table, clock: Timeline, t0_ns: int, t1_ns: int) -> float | None:
    """Return how many distinct `mb` were in flight in [t0_ns, t1_ns), the mean over the time in which any was.

    A micro-batch flies from the first compute, host or sample interval of its step on any rank to the last.
    """
    step, mb, cls = (numbers(intervals, name, -1) for name in ("step_id", "mb", "cls"))
    begin, end = clock.moved(intervals, "t0_ns"), clock.moved(intervals, "t1_ns")
    known = (step >= 0) & (mb >= 0) & (numbers(intervals, "rank", NO_RANK) != NO_RANK) & (end > begin)
    wanted = np.flatnonzero(known & np.isin(cls, _FLIGHT))
    if not len(wanted):
        return None
    order = wanted[np.lexsort((begin[wanted], step[wanted], mb[wanted]))]
    starts = np.flatnonzero(np.append(True, (np.diff(step[order]) != 0) | (np.diff(mb[order]) != 0)))
    since = np.maximum(np.minimum.reduceat(begin[order], starts), t0_ns)
    until = np.minimum(np.maximum.reduceat(end[order], starts), t1_ns)
    inside = until > since
    slot, since, until = mb[order][starts][inside], since[inside], until[inside]
    if not len(slot):
        return None
    each = sum(_covered(since[slot == number], until[slot == number]) for number in np.unique(slot))
    return each / _covered(since, until)


def _covered(begin: Int64, end: Int64) -> int:
    """Return how much time lies in any of the stretches."""
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    return int((end - np.maximum(begin, np.append(begin[:1], end[:-1]))).clip(min=0).sum())


def to_lines(found: Sequence[Bubble]) -> list[str]:
    """Return a line for each stage; none for a pipeline of one."""
    if len(found) < 2:
        return []
    lines = ["How much of its time with work each stage waited:"]
    for each in found:
        share = "no time with work on record" if each.share is None else f"{100 * each.share:.1f}%"
        if each.excess is not None and each.floor is not None:
            share += f"; {len(found)} equal stages with {each.in_flight:.1f} micro-batches in flight: "
            share += f"{100 * each.floor:.1f}%, so {100 * each.excess:+.1f}"
        lines.append(f"  stage {each.stage}: {share}")
    return lines
