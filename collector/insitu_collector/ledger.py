"""The rank ledger: where each rank's wall time went, exactly one class for each nanosecond of a window. Pure.

How interval classes become ledger classes: docs/verdicts.md, "The rank ledger".
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, IntervalClass, LedgerClass, Role
from insitu_collector.timeline import Int64, Timeline, numbers, timeline_of

Float64 = NDArray[np.float64]

_PLAIN: Final = {
    IntervalClass.IDLE: LedgerClass.NO_DEMAND,
    IntervalClass.SCHEDULE: LedgerClass.HOST,
    IntervalClass.RECV_XFER: LedgerClass.TRANSFER,
    IntervalClass.COMPUTE: LedgerClass.COMPUTE,
    IntervalClass.COLLECTIVE_WAIT: LedgerClass.COLLECTIVE,
    IntervalClass.HOST: LedgerClass.HOST,
    IntervalClass.SAMPLE: LedgerClass.COMPUTE,
    IntervalClass.SEND_WAIT: LedgerClass.WAIT_DOWNSTREAM,
    IntervalClass.SEND_XFER: LedgerClass.TRANSFER,
    IntervalClass.GC: LedgerClass.GC,
    IntervalClass.COMPILE: LedgerClass.COMPILE,
}
_ORDER: Final = {cls: place for place, cls in enumerate(LedgerClass)}
_CONTENDABLE: Final = (LedgerClass.COMPUTE, LedgerClass.HOST)


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

    @property
    def ranks(self) -> list[int]:
        return sorted(self.overlap_ns)

    def ns(self, rank: int, *classes: LedgerClass) -> int:
        """Return a rank's time in some classes (in all, when none is given)."""
        return sum(row.ns for row in self.rows if row.rank == rank and (not classes or row.cls in classes))


@dataclass(frozen=True, slots=True)
class _Spans:
    """One rank's intervals inside the window: disjoint, sorted, none empty."""

    begin: Int64
    end: Int64
    cls: Int64
    peer: Int64
    off_cpu: Float64
    """Nanoseconds of each span in which the step thread was not on a core."""
    overlap_ns: int

    @property
    def ns(self) -> Int64:
        return self.end - self.begin

    def only(self, wanted: NDArray[np.bool_]) -> _Spans:
        return _Spans(
            self.begin[wanted],
            self.end[wanted],
            self.cls[wanted],
            self.peer[wanted],
            self.off_cpu[wanted],
            0,
        )


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
    ranks = numbers(intervals, "rank", NO_RANK)
    spans: dict[int, _Spans] = {}
    for rank in stages:
        mine = intervals.filter(pa.array(ranks == rank))
        spans[rank] = _sweep(mine, _last_open(health, rank, clock), clock, t0_ns, t1_ns)
    demandless = _idle_of_first_stage(spans, stages)
    rows: list[LedgerRow] = []
    for rank, mine in spans.items():
        sums = _by_class(mine, rank, stages, demandless)
        _move_contended(sums, mine, _run_delays(health, rank, clock), t0_ns, t1_ns)
        sums[LedgerClass.UNRECORDED, None] += (t1_ns - t0_ns) - int(mine.ns.sum())
        rows += [LedgerRow(stages[rank], rank, cls, ns, on) for (cls, on), ns in sums.items() if ns]
    rows.sort(key=lambda row: (row.stage, row.rank, _ORDER[row.cls], row.on_rank is None, row.on_rank or 0))
    return Ledger(t0_ns, t1_ns, tuple(rows), {rank: mine.overlap_ns for rank, mine in spans.items()})


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


def _sweep(rows: pa.Table, still_open: Int64 | None, clock: Timeline, t0_ns: int, t1_ns: int) -> _Spans:
    """Clip a rank's intervals to the window; where two overlap, the one that began first keeps the time."""
    names = ("cls", "peer", "cpu_ns")
    cls, peer, cpu = (numbers(rows, name, missing) for name, missing in zip(names, (-1, -1, 0), strict=True))
    begin, end = clock.moved(rows, "t0_ns"), clock.moved(rows, "t1_ns")
    if still_open is not None and (not len(end) or still_open[0] >= end.max()):
        columns = zip((begin, end, cls, peer, cpu), (*still_open, 0), strict=True)
        begin, end, cls, peer, cpu = (np.append(column, value) for column, value in columns)
    order = np.argsort(begin, kind="stable")
    begin, end, cls, peer, cpu = (column[order] for column in (begin, end, cls, peer, cpu))
    whole = np.maximum(end - begin, 1)
    claimed = np.maximum(np.clip(end, t0_ns, t1_ns) - np.clip(begin, t0_ns, t1_ns), 0)
    taken_until = np.concatenate([[t0_ns], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    begin = np.clip(np.maximum(begin, taken_until), t0_ns, t1_ns)
    end = np.clip(end, t0_ns, t1_ns)
    ns = np.maximum(end - begin, 0)
    off_cpu = ns * (1.0 - np.clip(cpu / whole, 0.0, 1.0))
    swept = _Spans(begin, end, cls, peer, off_cpu, 0).only(ns > 0)
    return _Spans(swept.begin, swept.end, swept.cls, swept.peer, swept.off_cpu, int(claimed.sum() - ns.sum()))


def _last_open(health: pa.Table, rank: int, clock: Timeline) -> Int64 | None:
    """Return (begin, end, cls, peer) of the interval open at the rank's last heartbeat, if one was."""
    rows = health.filter(pa.array(numbers(health, "rank", NO_RANK) == rank))
    if not rows.num_rows:
        return None
    t_ns = clock.moved(rows, "t_ns")
    last = int(np.argmax(t_ns))
    if not rows["open_cls"][last].is_valid or rows["open_since_ns"][last].as_py() is None:
        return None
    since = int(clock.moved(rows, "open_since_ns")[last])
    peer = numbers(rows, "open_peer", NO_RANK)[last]
    return np.array([since, max(since, int(t_ns[last])), rows["open_cls"][last].as_py(), peer], np.int64)


def _idle_of_first_stage(spans: dict[int, _Spans], stages: dict[int, int]) -> _Spans | None:
    """Return when the first stage was idle: then there was no work anywhere, so nobody waited for work."""
    first = [rank for rank, stage in stages.items() if stage == min(stages.values()) and len(spans[rank].cls)]
    if not first:
        return None
    return spans[first[0]].only(spans[first[0]].cls == IntervalClass.IDLE)


def _by_class(
    spans: _Spans, rank: int, stages: dict[int, int], idle: _Spans | None
) -> defaultdict[tuple[LedgerClass, int | None], int]:
    sums: defaultdict[tuple[LedgerClass, int | None], int] = defaultdict(int)
    keys, place = np.unique(np.stack([spans.cls, spans.peer]), axis=1, return_inverse=True)
    for at, (number, peer) in enumerate(keys.T):
        mine = spans.only(place.reshape(-1) == at)
        ns = int(mine.ns.sum())
        cls, on_rank = classify(int(number), int(peer), rank, stages)
        if number == IntervalClass.RECV_WAIT and cls is LedgerClass.WAIT_UPSTREAM and idle is not None:
            demandless = _overlap_ns(mine, idle) if stages[rank] > min(stages.values()) else 0
            sums[LedgerClass.NO_DEMAND, None] += demandless
            ns -= demandless
        sums[cls, on_rank] += ns
    return sums


def classify(number: int, peer: int, rank: int, stages: dict[int, int]) -> tuple[LedgerClass, int | None]:
    """Return the ledger class of an interval, and for a wait the rank waited for."""
    if number == IntervalClass.RECV_WAIT:
        mine, theirs = stages.get(rank, rank), stages.get(peer, peer)
        if peer == NO_RANK or theirs < mine:
            return LedgerClass.WAIT_UPSTREAM, peer
        return (LedgerClass.WAIT_DOWNSTREAM if theirs > mine else LedgerClass.COLLECTIVE), peer
    if number not in IntervalClass._value2member_map_:
        return LedgerClass.OTHER, None
    cls = _PLAIN[IntervalClass(number)]
    return cls, peer if cls is LedgerClass.WAIT_DOWNSTREAM else None


def _overlap_ns(waits: _Spans, idle: _Spans) -> int:
    covered = RunningSum(idle.begin, idle.end, idle.ns.astype(np.float64))
    return int(np.rint(covered(waits.end) - covered(waits.begin)).sum()) if len(waits.cls) else 0


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


def _run_delays(health: pa.Table, rank: int, clock: Timeline) -> list[tuple[Int64, Int64]]:
    """Return (t_ns, cumulative run-queue delay) of each epoch of a rank."""
    rows = health.filter(pa.array(numbers(health, "rank", NO_RANK) == rank))
    t_ns, delay = clock.moved(rows, "t_ns"), numbers(rows, "run_delay_ns", 0)
    epochs = np.asarray(rows["epoch"])
    found = []
    for epoch in np.unique(epochs):
        order = np.argsort(t_ns[epochs == epoch], kind="stable")
        found.append((t_ns[epochs == epoch][order], delay[epochs == epoch][order]))
    return found


def _move_contended(
    sums: defaultdict[tuple[LedgerClass, int | None], int],
    spans: _Spans,
    delays: list[tuple[Int64, Int64]],
    t0_ns: int,
    t1_ns: int,
) -> None:
    """Move run-queue delay out of compute and host: at most the time the thread was off its core there."""
    off = {cls: _off_cpu(spans, cls) for cls in _CONTENDABLE}
    moved = dict.fromkeys(_CONTENDABLE, 0.0)
    for t_ns, delay in delays:
        begin, end = np.clip(t_ns[:-1], t0_ns, t1_ns), np.clip(t_ns[1:], t0_ns, t1_ns)
        share = (end - begin) / np.maximum(np.diff(t_ns), 1)
        waited = np.maximum(np.diff(delay), 0) * share
        there = {cls: integral(end) - integral(begin) for cls, integral in off.items()}
        total = sum(there.values())
        taken = np.minimum(waited, total) / np.maximum(total, 1e-9)
        for cls in _CONTENDABLE:
            moved[cls] += float((there[cls] * taken).sum())
    for cls in _CONTENDABLE:
        whole = min(int(moved[cls]), sums[cls, None])
        sums[cls, None] -= whole
        sums[LedgerClass.CONTENDED, None] += whole


def _off_cpu(spans: _Spans, cls: LedgerClass) -> RunningSum:
    numbers_of = [number for number, plain in _PLAIN.items() if plain is cls]
    mine = spans.only(np.isin(spans.cls, numbers_of))
    return RunningSum(mine.begin, mine.end, mine.off_cpu)
