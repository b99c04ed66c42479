"""Which interval handed work to which: from a stage to the next, and sampled ids back to the first. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.rows.row_maps import entries

_RECEIVES: Final = (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)
_SENDS: Final = (IntervalClass.SEND_XFER, IntervalClass.SEND_WAIT)
"""The better source first."""
_WORK: Final = (IntervalClass.COMPUTE, IntervalClass.SAMPLE)
_MOST_RANKS: Final = 2**16
"""Ranks are int16."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Intervals of one replica as columns of one length, int64 each; times on one timeline."""

    rank: Int64
    t0_ns: Int64
    t1_ns: Int64
    cls: Int64
    step: Int64
    peer: Int64

    @classmethod
    def of(cls, rows: pa.Table, clock: Timeline) -> Intervals:
        """Return the columns of an `intervals` table."""
        names = ("rank", "cls", "step_id", "peer")
        rank, number, step, peer = (numbers(rows, name, -1) for name in names)
        return cls(rank, clock.moved(rows, "t0_ns"), clock.moved(rows, "t1_ns"), number, step, peer)


@dataclass(frozen=True, slots=True)
class Flows:
    """Places of intervals: the work of `source[i]` went on in `sink[i]`. A sink ends after its source begins."""

    source: Int64
    sink: Int64
    num_against_clock: int = 0
    """Left out because the sink ended before the source began, as it may when clocks of hosts disagree."""

    def __len__(self) -> int:
        return len(self.source)


def handovers(rows: Intervals, stages: Mapping[int, int]) -> Flows:
    """Return from which interval the input of each step came that a rank received from an earlier stage.

    The sink is the last receive of a step from a peer; the source is the peer's first send of that step to this rank
    (a pause splits a send, and what it carries may be there before the second piece), or, where it recorded none, its
    last computation of the step.
    """
    at = np.flatnonzero(np.isin(rows.cls, _RECEIVES) & (rows.step >= 0) & (rows.peer >= 0))
    of_stage = np.array([stages.get(int(rank), -1) for rank in range(max(stages, default=-1) + 1)], np.int64)
    known = (rows.peer[at] < len(of_stage)) & (rows.rank[at] < len(of_stage))
    at = at[known]
    mine, theirs = of_stage[rows.rank[at]], of_stage[rows.peer[at]]
    at = at[(theirs >= 0) & (theirs < mine)]
    key, sink = _last(_key(rows.step[at], rows.rank[at], rows.peer[at]), rows.t1_ns[at], at)
    source = np.full(len(key), -1)
    for cls in _SENDS:
        sends = np.flatnonzero((rows.cls == cls) & (rows.step >= 0) & (rows.peer >= 0))
        sent = _last(_key(rows.step[sends], rows.peer[sends], rows.rank[sends]), -rows.t0_ns[sends], sends)
        source = np.where(source < 0, _found(key, *sent), source)
    computed = _found(_key(rows.step[sink], rows.peer[sink]), *_last_work(rows))
    return _causal(rows, np.where(source < 0, computed, source), sink)


def ids_back(rows: Intervals, steps: pa.Table, clock: Timeline, stages: Mapping[int, int]) -> Flows:
    """Return, for each step of the first stage that goes on with what an earlier step sampled, from where that came.

    A step follows the one before it in its micro-batch slot when they share a request that was sampled. The source is
    the last stage's last work on the earlier step; the sink is the first stage's last receive for the later step, or
    the first interval of it.
    """
    if len(set(stages.values())) < 2:
        return Flows(rows.step[:0], rows.step[:0])
    first, last = (min(r for r in stages if stages[r] == pick(stages.values())) for pick in (min, max))
    before, after = _successors(steps.filter(pc.equal(steps["rank"], first)), clock)
    work = _last_work(rows)
    source = _found(_key(before, np.full(len(before), last)), *work)
    mine = np.flatnonzero((rows.rank == first) & (rows.step >= 0))
    received = mine[np.isin(rows.cls[mine], _RECEIVES)]
    sink = _found(after, *_last(rows.step[received], rows.t1_ns[received], received))
    begun = _last(rows.step[mine], -rows.t0_ns[mine], mine)
    sink = np.where(sink < 0, _found(after, *begun), sink)
    known = sink >= 0
    return _causal(rows, source[known], sink[known])


def _successors(steps: pa.Table, clock: Timeline) -> tuple[Int64, Int64]:
    """Return (step, the next step of its slot that goes on with a request it sampled)."""
    mapped = steps.filter(pc.is_valid(steps["rows"]))
    step, slot = numbers(mapped, "step_id", -1), numbers(mapped, "mb", -1)
    if not len(step):
        return step, step
    order = np.lexsort((step, clock.moved(mapped, "t0_ns"), slot))
    step, slot = step[order], slot[order]
    maps = entries(mapped["rows"].take(pa.array(order)))
    lengths = np.asarray(pc.list_value_length(mapped["rows"])).astype(np.int64)[order]
    of = np.repeat(np.arange(len(step)), lengths)
    _, request = np.unique(maps["request"].astype(str), return_inverse=True)
    num_requests = int(request.max(initial=0)) + 1
    sampled = maps["sample_row"] >= 0
    goes_on = np.isin((of[sampled] + 1) * num_requests + request[sampled], of * num_requests + request)
    has_next = np.unique(of[sampled][goes_on])
    has_next = has_next[has_next + 1 < len(step)]
    has_next = has_next[slot[has_next] == slot[has_next + 1]]
    return step[has_next], step[has_next + 1]


def _last_work(rows: Intervals) -> tuple[Int64, Int64]:
    work = np.flatnonzero(np.isin(rows.cls, _WORK) & (rows.step >= 0))
    return _last(_key(rows.step[work], rows.rank[work]), rows.t1_ns[work], work)


def _key(step: Int64, rank: Int64, peer: Int64 | None = None) -> Int64:
    """Return one number for (step, rank[, peer]); only steps 2**32 apart would share one, and no window holds such."""
    key = step * _MOST_RANKS + rank
    return key if peer is None else key * _MOST_RANKS + peer


def _last(key: Int64, by: Int64, place: Int64) -> tuple[Int64, Int64]:
    """Return the distinct keys in order, and for each the place whose `by` is largest."""
    order = np.lexsort((by, key))
    key, place = key[order], place[order]
    ends = np.flatnonzero(np.append(key[1:] != key[:-1], True)) if len(key) else order
    return key[ends], place[ends]


def _found(wanted: Int64, keys: Int64, places: Int64) -> Int64:
    """Return the place of each wanted key, -1 where it is not there."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, places[at], -1)


def _causal(rows: Intervals, source: Int64, sink: Int64) -> Flows:
    known = source >= 0
    source, sink = source[known], sink[known]
    sink = _past_pause(rows, source, sink)
    forward = rows.t0_ns[source] <= rows.t1_ns[sink]
    return Flows(source[forward], sink[forward], int((~forward).sum()))


def _past_pause(rows: Intervals, source: Int64, sink: Int64) -> Int64:
    """Return the sinks; where a pause cut a receive short and the send came during it, the pause."""
    order = np.lexsort((rows.t0_ns, rows.rank))
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    after = order[np.minimum(at[sink] + 1, len(order) - 1)] if len(sink) else sink
    is_pause = (rows.rank[after] == rows.rank[sink]) & (rows.cls[after] == IntervalClass.GC)
    return np.where(is_pause & (rows.t1_ns[sink] < rows.t0_ns[source]), after, sink)
