"""Intervals as spans to draw: which lane, when, which ledger class; fewer where a pixel holds many. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.ledger.classes import PLACE, classes_of
from insitu_collector.ledger.window import RunningSum

CLASSES: Final = tuple(LedgerClass)
MOST_SPANS: Final = 8_000
"""Of one answer: more cannot be told apart on any screen."""
_NO_DEMAND: Final = PLACE[LedgerClass.NO_DEMAND]


@dataclass(frozen=True, slots=True)
class Spans:
    """Columns of one length, int64 each, by begin. `cls` is a place in `CLASSES`, `lane` one in the list of ranks."""

    lane: Int64
    t0_ns: Int64
    t1_ns: Int64
    cls: Int64
    step: Int64
    mb: Int64
    peer: Int64
    merged: Int64
    """How many intervals a span stands for."""

    def __len__(self) -> int:
        return len(self.lane)

    def only(self, wanted: NDArray[Any]) -> Spans:
        return Spans(*(getattr(self, item.name)[wanted] for item in fields(self)))


def spans_of(rows: pa.Table, clock: Timeline, stages: Mapping[int, int]) -> Spans:
    """Return the intervals of ranks as spans. A wait for work while the first stage had none is no demand."""
    lanes = {rank: place for place, rank in enumerate(lanes_of(stages))}
    rank = numbers(rows, "rank", NO_RANK)
    rows = rows.filter(pa.array(np.isin(rank, list(lanes))))
    rank, peer = numbers(rows, "rank", NO_RANK), numbers(rows, "peer", NO_RANK)
    begin, end = clock.moved(rows, "t0_ns"), clock.moved(rows, "t1_ns")
    found = Spans(
        lane=_mapped(rank, lanes),
        t0_ns=begin,
        t1_ns=end,
        cls=ledger_classes(rows, clock, stages),
        step=numbers(rows, "step_id", -1),
        mb=numbers(rows, "mb", -1),
        peer=peer,
        merged=np.ones(rows.num_rows, np.int64),
    )
    return found.only(np.argsort(begin, kind="stable"))


def lanes_of(stages: Mapping[int, int]) -> list[int]:
    """Return the ranks in the order they are drawn: by stage, then rank."""
    return sorted(stages, key=lambda rank: (stages[rank], rank))


def _mapped(values: Int64, mapping: Mapping[int, int]) -> Int64:
    keys, place = np.unique(values, return_inverse=True)
    return np.array([mapping[int(key)] for key in keys], np.int64)[place.reshape(-1)]


def ledger_classes(rows: pa.Table, clock: Timeline, stages: Mapping[int, int]) -> Int64:
    """Return the ledger class of each interval, as a place in `CLASSES`.

    A wait for work of which most fell into a time when the first stage was idle is no demand.
    """
    number, peer, rank = (
        numbers(rows, name, missing) for name, missing in (("cls", -1), ("peer", NO_RANK), ("rank", NO_RANK))
    )
    if not len(number):
        return number
    ranks = np.union1d(rank, np.array(list(stages), np.int64))
    of = np.array([stages.get(int(each), int(each)) for each in ranks], np.int64)
    found, _ = classes_of(number, peer, np.searchsorted(ranks, rank), ranks, of)
    first = [each for each in stages if stages[each] == min(stages.values())][:1]
    idle = np.isin(rank, first) & (number == IntervalClass.IDLE)
    waits = (number == IntervalClass.RECV_WAIT) & (found == PLACE[LedgerClass.WAIT_UPSTREAM]) & ~np.isin(rank, first)
    if idle.any() and waits.any():
        begin, end = clock.moved(rows, "t0_ns"), clock.moved(rows, "t1_ns")
        found[np.flatnonzero(waits)[_mostly_in(begin[idle], end[idle], begin[waits], end[waits])]] = _NO_DEMAND
    return found


def _mostly_in(idle_begin: Int64, idle_end: Int64, begin: Int64, end: Int64) -> NDArray[np.bool_]:
    order = np.argsort(idle_begin, kind="stable")
    covered = RunningSum(idle_begin[order], idle_end[order], (idle_end - idle_begin)[order].astype(np.float64))
    found: NDArray[np.bool_] = 2 * (covered(end) - covered(begin)) > end - begin
    return found


def merged_by_pixel(spans: Spans, pixel_ns: int) -> Spans:
    """Return fewer spans: those shorter than a pixel become one a (lane, pixel), of the class that took most of it."""
    pixel_ns = max(1, pixel_ns)
    short = spans.t1_ns - spans.t0_ns < pixel_ns
    if not short.any():
        return spans
    few = spans.only(short)
    key = few.lane * (2**40) + few.t0_ns // pixel_ns - (int(few.t0_ns.min()) // pixel_ns)
    _, where, place = np.unique(key, return_index=True, return_inverse=True)
    place = place.reshape(-1)
    weight = np.zeros((len(where), len(CLASSES)))
    np.add.at(weight, (place, few.cls), few.t1_ns - few.t0_ns)
    end = np.full(len(where), np.iinfo(np.int64).min)
    np.maximum.at(end, place, few.t1_ns)
    count = np.bincount(place, few.merged, len(where)).astype(np.int64)
    one = count == 1
    joined = Spans(
        lane=few.lane[where],
        t0_ns=few.t0_ns[where],  # spans come by begin, so the first of a pixel began first
        t1_ns=end,
        cls=weight.argmax(axis=1).astype(np.int64),
        step=np.where(one, few.step[where], -1),
        mb=np.where(one, few.mb[where], -1),
        peer=np.where(one, few.peer[where], NO_RANK),
        merged=count,
    )
    rest = spans.only(~short)
    both = Spans(*(np.concatenate([getattr(rest, f.name), getattr(joined, f.name)]) for f in fields(Spans)))
    return both.only(np.argsort(both.t0_ns, kind="stable"))


def fitted(spans: Spans, t0_ns: int, t1_ns: int, pixels: int, most: int = MOST_SPANS) -> Spans:
    """Return the spans of a window at the detail `pixels` columns can show, at most `most` (or one a lane)."""
    if len(spans) <= min(most, 4 * pixels):
        return spans
    pixel_ns = max(1, (t1_ns - t0_ns) // max(1, pixels))
    found = merged_by_pixel(spans, pixel_ns)
    while len(found) > most and pixel_ns < 2 * (t1_ns - t0_ns):
        pixel_ns *= 2
        found = merged_by_pixel(found, pixel_ns)
    return found
