"""When each step was worked on by any rank, whom it waited for in between, and what a decode-only step takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.classes import classify
from insitu_collector.requests.cover import Cover, cover, expand
from insitu_collector.rows.tape import Columns

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

LEDGER_CLASSES: Final = tuple(LedgerClass)
_WORK: Final = (IntervalClass.COMPUTE, IntervalClass.SAMPLE)
_OWN: Final = (*_WORK, IntervalClass.HOST)
NEAR_NS: Final = 10_000_000_000
"""A decode-only step says what its like takes for so long before and after: what a step takes drifts."""
NUM_NEAR: Final = 8
"""... and at most so many of them on either side count."""
MIN_NEAR: Final = 5
"""Fewer decode-only steps of a size than this nearby say nothing."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """Steps in order of their number, one entry each; and stretches of time, sorted by (step, begin)."""

    step: Int64
    begin: Int64
    """First work of any rank, ..."""
    end: Int64
    """... and the end of the last."""
    busy_ns: Int64
    """Time in which at least one rank computed or sampled it."""
    whole: Bool
    """Every stage's forward pass is on record, ..."""
    passed: Bool
    """... or hidden in a pause of the collector there: then nothing of it is missing."""
    first_rank: Int64
    """The rank that began it."""
    work: Columns
    """`at` (which step), `begin`, `end`: some rank computed or sampled it."""
    waits: Columns
    """Between the first work and the last of steps that `passed`: `at` and the columns of `doings`, of the rank that
    was next."""

    def find(self, steps: Int64) -> Int64:
        """Return the place of each step, -1 for one nobody is known to have worked on."""
        place = np.minimum(np.searchsorted(self.step, steps), max(0, len(self.step) - 1))
        return np.where(self.step[place] == steps, place, -1) if len(self.step) else np.full(len(steps), -1)


def step_work(intervals: Columns, stages: Mapping[int, int]) -> StepWork:
    """Return when steps were worked on, by `rank, t0, t` (the end), `cls, step, peer` of intervals.

    Ranks without a stage are left out.
    """
    known = np.isin(intervals["rank"], list(stages)) & (intervals["step"] >= 0) & (intervals["t"] > intervals["t0"])
    mine = np.flatnonzero(known & np.isin(intervals["cls"], _WORK))
    rank = intervals["rank"][mine]
    step, of = np.unique(intervals["step"][mine], return_inverse=True)
    found = cover(of, intervals["t0"][mine], intervals["t"][mine])
    new = found.key[1:] != found.key[:-1]
    first, last = (np.concatenate(parts)[: len(found.key)] for parts in (([True], new), (new, [True])))
    work = _merged(found)
    whole = _on_every_stage(intervals, stages, step, IntervalClass.COMPUTE)
    passed = _on_every_stage(intervals, stages, step, IntervalClass.COMPUTE, IntervalClass.GC)
    gap = np.flatnonzero((found.depth == 0) & passed[found.key])
    awaited = rank[found.begun[gap + 1]]
    waits = doings(intervals, stages, awaited, found.begin[gap], found.end[gap], step[found.key[gap]])
    return StepWork(
        step=step,
        begin=found.begin[first],
        end=found.end[last],
        busy_ns=np.bincount(work["at"], work["end"] - work["begin"], len(step)).astype(np.int64),
        whole=whole,
        passed=passed,
        first_rank=rank[found.begun[first]],
        work=work,
        waits={**waits, "at": found.key[gap][waits["of"]]},
    )


def _on_every_stage(intervals: Columns, stages: Mapping[int, int], step: Int64, *classes: IntervalClass) -> Bool:
    """Tell which steps (sorted, known) have an interval of one of these classes on every stage."""
    found = np.ones(len(step), bool)
    of_class = np.isin(intervals["cls"], classes)
    for stage in set(stages.values()):
        ranks = [rank for rank, theirs in stages.items() if theirs == stage]
        found &= np.isin(step, intervals["step"][of_class & np.isin(intervals["rank"], ranks)])
    return found


def _merged(found: Cover) -> Columns:
    """Return the stretches that anything covers, pieces that touch joined."""
    at = np.flatnonzero(found.depth > 0)
    key, begin, end = found.key[at], found.begin[at], found.end[at]
    joined = (key[1:] == key[:-1]) & (begin[1:] == end[:-1])
    starts, ends = np.concatenate([[True], ~joined])[: len(at)], np.concatenate([~joined, [True]])[: len(at)]
    return {"at": key[starts], "begin": begin[starts], "end": end[ends]}


def doings(
    intervals: Columns, stages: Mapping[int, int], rank: Int64, begin: Int64, end: Int64, step: Int64
) -> Columns:
    """Return what a rank was recorded to do in each of n stretches in which a step waited for it.

    Columns `of` (the stretch), `begin`, `end`, `rank`, `cls` (a place in `LEDGER_CLASSES`), and `own`: it worked for
    that very step; sorted by (`of`, `begin`). Where any rank has no record there is none here: it may have worked.
    """
    lit_begin, lit_end = _lit(intervals, stages)
    names = ("of", "begin", "end", "rank", "cls", "own")
    parts = [{name: np.zeros(0, np.int64) for name in names}]
    for number in np.unique(rank).tolist():
        asked, mine = np.flatnonzero(rank == number), np.flatnonzero(intervals["rank"] == number)
        mine = mine[np.argsort(intervals["t0"][mine], kind="stable")]
        of, place, t0, t1 = _overlaps(begin[asked], end[asked], intervals["t0"][mine], intervals["t"][mine])
        piece, _, t0, t1 = _overlaps(t0, t1, lit_begin, lit_end)
        of, place = asked[of[piece]], mine[place[piece]]
        recorded = intervals["cls"][place]
        cls = _ledger_classes(recorded, intervals["peer"][place], number, stages)
        own = np.isin(recorded, _OWN) & (intervals["step"][place] == step[of])
        parts.append(dict(zip(names, (of, t0, t1, np.full(len(of), number), cls, own), strict=True)))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
    order = np.lexsort((joined["begin"], joined["of"]))
    return {name: column[order] for name, column in joined.items()}


def _lit(intervals: Columns, stages: Mapping[int, int]) -> tuple[Int64, Int64]:
    """Return when every rank has a record, disjoint and sorted."""
    known = np.flatnonzero(np.isin(intervals["rank"], list(stages)))
    each = _merged(cover(intervals["rank"][known], intervals["t0"][known], intervals["t"][known]))
    found = cover(np.zeros(len(each["at"]), np.int64), each["begin"], each["end"])
    everywhere = found.depth == len(stages)
    return found.begin[everywhere], found.end[everywhere]


def _overlaps(begin: Int64, end: Int64, t0: Int64, t1: Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """Return where n stretches and m others, sorted by `t0`, overlap: (which stretch, which other, begin, end)."""
    low = np.searchsorted(np.maximum.accumulate(t1), begin, side="right")
    of, place = expand(low, np.maximum(np.searchsorted(t0, end) - low, 0))
    both_begin, both_end = np.maximum(t0[place], begin[of]), np.minimum(t1[place], end[of])
    kept = both_end > both_begin
    return of[kept], place[kept], both_begin[kept], both_end[kept]


def _ledger_classes(cls: Int64, peer: Int64, rank: int, stages: Mapping[int, int]) -> Int64:
    keys, place = np.unique(np.stack([cls, peer]), axis=1, return_inverse=True)
    known = dict(stages)
    names = [classify(int(number), int(other), rank, known)[0] for number, other in keys.T]
    return np.array([LEDGER_CLASSES.index(name) for name in names], np.int64)[place.reshape(-1)]


def typical_ns(work: StepWork, num_decoding: Int64, num_prefill: Int64) -> Float64:
    """Return, for each step, the median of the decode-only steps nearby that are of its size; NaN where too few are.

    num_decoding, num_prefill: rows of each step. Sizes are decoding rows in powers of two: 1, 2, 3-4, 5-8 ...
    """
    size = np.ceil(np.log2(np.maximum(num_decoding, 1))).astype(np.int64)
    alike = work.whole & (num_decoding > 0) & (num_prefill == 0)
    found = np.full(len(work.step), np.nan)
    for bucket in np.unique(size[(num_decoding > 0) & (num_prefill > 0)]).tolist():
        asked = np.flatnonzero((size == bucket) & (num_decoding > 0) & (num_prefill > 0) & work.whole)
        known = np.flatnonzero(alike & (size == bucket))
        order = known[np.argsort(work.begin[known], kind="stable")]
        found[asked] = _median_nearby(work.begin[order], work.busy_ns[order], work.begin[asked])
    return found


def _median_nearby(t_ns: Int64, ns: Int64, asked_ns: Int64) -> Float64:
    if not len(t_ns):
        return np.full(len(asked_ns), np.nan)
    middle = np.searchsorted(t_ns, asked_ns)
    places = middle[:, None] + np.arange(-NUM_NEAR, NUM_NEAR)
    inside = (places >= 0) & (places < len(t_ns))
    places = np.clip(places, 0, len(t_ns) - 1)
    inside &= np.abs(t_ns[places] - asked_ns[:, None]) <= NEAR_NS
    values = np.sort(np.where(inside, ns[places].astype(np.float64), np.inf), axis=1)
    count = inside.sum(axis=1)
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    rows = np.arange(len(asked_ns))
    middle_two = (values[rows, low] + values[rows, np.minimum(high, values.shape[1] - 1)]) / 2
    return np.where(count >= MIN_NEAR, middle_two, np.nan)
