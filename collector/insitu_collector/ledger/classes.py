"""Which ledger class an interval is, for one and for many: docs/verdicts.md, "The rank ledger". Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from insitu.vocabulary import NO_RANK, IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64

PLACE: Final = {cls: place for place, cls in enumerate(LedgerClass)}
NOBODY: Final = -(2**15) - 1
"""Whom a class that waits for nobody waits for: a number that no int16 `peer` has."""

_PLAIN: Final = {
    IntervalClass.IDLE: LedgerClass.NO_DEMAND,
    IntervalClass.SCHEDULE: LedgerClass.HOST,
    IntervalClass.RECV_WAIT: LedgerClass.COLLECTIVE,
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
"""`RECV_WAIT` as it is among ranks of one stage; on another stage it is a wait for that one."""
_PLACES: Final = np.array([PLACE[_PLAIN[cls]] for cls in IntervalClass] + [PLACE[LedgerClass.OTHER]], np.int64)


def classify(number: int, peer: int, rank: int, stages: Mapping[int, int]) -> tuple[LedgerClass, int | None]:
    """Return the ledger class of an interval, and for a wait the rank waited for."""
    ranks = np.array(sorted({rank, *stages}), np.int64)
    of = np.array([stages.get(int(each), int(each)) for each in ranks], np.int64)
    number_, peer_, place = (np.array([value], np.int64) for value in (number, peer, np.searchsorted(ranks, rank)))
    cls, on = classes_of(number_, peer_, place, ranks, of)
    return tuple(LedgerClass)[int(cls[0])], None if on[0] == NOBODY else int(on[0])


def classes_of(number: Int64, peer: Int64, rank: Int64, ranks: Int64, stages: Int64) -> tuple[Int64, Int64]:
    """Return for each interval its class (a place in `LedgerClass`) and whom it waits for (`NOBODY`).

    `rank` holds places in `ranks` (ascending), whose stages `stages` are. A peer that is none of them stands for a
    stage of its own number; a number that is no `IntervalClass` is `other`.
    """
    last = len(_PLACES) - 1
    cls = _PLACES[np.where((number >= 0) & (number < last), number, last)]
    on = np.where((cls == PLACE[LedgerClass.WAIT_DOWNSTREAM]), peer, NOBODY)
    receives = np.flatnonzero(number == IntervalClass.RECV_WAIT)
    theirs, peers = peer[receives].copy(), peer[receives]
    if len(ranks):
        at = np.minimum(np.searchsorted(ranks, peers), len(ranks) - 1)
        theirs = np.where(ranks[at] == peers, stages[at], peers)
        mine = stages[rank[receives]]
        upstream = (peers == NO_RANK) | (theirs < mine)
        cls[receives[upstream]] = PLACE[LedgerClass.WAIT_UPSTREAM]
        cls[receives[~upstream & (theirs > mine)]] = PLACE[LedgerClass.WAIT_DOWNSTREAM]
    on[receives] = peers
    return cls, on
