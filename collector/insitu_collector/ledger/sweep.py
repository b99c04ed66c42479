"""The rank ledger, computed: the intervals of all ranks, swept and summed into tiles of equal width. Pure numpy.

`window.rank_ledger` is the case of one tile, `tiles.TileLedger` that of many. Everything is int64 but the
share of run-queue delay, and no result depends on the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.classes import NOBODY, PLACE, classes_of
from insitu_collector.ledger.clock_errors import NUM_ON, by_rank, errors_of
from insitu_collector.ledger.columns import Columns, Delays, Grid, Intervals, Sums, Window

NUM_CLASSES: Final = len(PLACE)
_COMPUTE, _HOST, _CONTENDED = (PLACE[c] for c in (LedgerClass.COMPUTE, LedgerClass.HOST, LedgerClass.CONTENDED))
_NO_DEMAND, _UNRECORDED = PLACE[LedgerClass.NO_DEMAND], PLACE[LedgerClass.UNRECORDED]
_UPSTREAM, _TRANSFER = PLACE[LedgerClass.WAIT_UPSTREAM], PLACE[LedgerClass.TRANSFER]


@dataclass(frozen=True, slots=True)
class _Cells(Columns):
    """Each rank's known time, cut at tiles' edges and at heartbeats. By rank, then time."""

    rank: Int64
    begin: Int64
    end: Int64
    tile: Int64
    """-1 outside the tiles."""


@dataclass(frozen=True, slots=True)
class _Pieces(Columns):
    """Parts of swept intervals, each inside one cell."""

    source: Int64
    cell: Int64
    begin: Int64
    end: Int64


def tile_sums(rows: Intervals, delays: Delays, grid: Grid, window: Window) -> Sums:
    """Return where the time of each rank in each tile went; the classes of a (tile, rank) sum to the width exactly."""
    known = window.known
    rows, lost_until = _in_order(rows.only((rows.end > known[0]) & (rows.begin < known[1]) & (rows.end > rows.begin)))
    begin = np.clip(np.maximum(rows.begin, lost_until), *known)
    end = np.maximum(np.clip(rows.end, *known), begin)
    cells, first, last, where = _cells(rows.rank, begin, end, delays, grid, window)
    pieces = _cut(cells, begin, end, first, last)
    cls, on = classes_of(rows.cls, rows.peer, rows.rank, grid.ranks, grid.stages)
    totals = _Totals(window.count, len(grid.ranks))
    place = totals.place(cells)[pieces.cell]
    ns = pieces.end - pieces.begin
    totals.add(place, cls[pieces.source], on[pieces.source], ns)
    idle = _Idle(rows, pieces, cells, grid, window.count)
    later = grid.stages[rows.rank] > grid.first_stage
    waits = np.flatnonzero(((rows.cls == IntervalClass.RECV_WAIT) & (cls == _UPSTREAM) & later)[pieces.source])
    demandless = idle.within(pieces.begin[waits], pieces.end[waits])
    totals.add(place[waits], cls[pieces.source[waits]], on[pieces.source[waits]], -demandless)
    totals.add_plain(place[waits], _NO_DEMAND, demandless)
    _move_contended(totals, rows, cls, pieces, cells, delays, where, known)
    overlap = _overlaps(rows, begin, totals, window)
    doubtful = _doubtful(rows, cls, pieces, place, grid, idle, totals)
    return totals.sums(window.width_ns, overlap, doubtful)


def _in_order(rows: Intervals) -> tuple[Intervals, Int64]:
    """Return the rows by rank and begin, and up to when earlier rows of the rank have taken the time."""
    order = np.argsort(rows.rank.astype(np.int16), kind="stable")
    rank, begin = rows.rank[order], rows.begin[order]
    if ((np.diff(begin) <= 0) & (np.diff(rank) == 0)).any():  # they did not come by begin, or two begin at once
        order = np.lexsort((rows.cpu, rows.peer, rows.cls, rows.end, rows.seq, rows.begin, rows.rank))
    rows = rows.only(order)
    until = np.full(len(rows.rank), np.iinfo(np.int64).min)
    for here in by_rank(rows.rank):
        np.maximum.accumulate(rows.end[here][:-1], out=until[here][1:])
    return rows, until


def _cells(
    rank: Int64, begin: Int64, end: Int64, delays: Delays, grid: Grid, window: Window
) -> tuple[_Cells, Int64, Int64, tuple[Int64, Int64]]:
    """Return the cells; first and last one of each interval; first one of each delay, and the one after its last."""
    known = window.known
    edges = np.concatenate([window.edges, known])
    first, last = np.empty(len(rank), np.int64), np.empty(len(rank), np.int64)
    since, until = np.clip(delays.begin, *known), np.clip(delays.end, *known)
    where = np.empty(len(since), np.int64), np.empty(len(since), np.int64)
    of_rows = np.searchsorted(rank, np.arange(len(grid.ranks) + 1))
    of_delays = np.searchsorted(delays.rank, np.arange(len(grid.ranks) + 1))
    found: list[Int64] = []
    offset = 0
    for place in range(len(grid.ranks)):
        mine, beats = slice(*of_rows[place : place + 2]), slice(*of_delays[place : place + 2])
        cuts = np.sort(np.concatenate([edges, since[beats], until[beats]]))
        first[mine] = np.searchsorted(cuts, begin[mine], side="right") - 1 + offset
        last[mine] = np.searchsorted(cuts, end[mine], side="left") - 1 + offset
        for side, t_ns in zip(where, (since, until), strict=True):
            side[beats] = np.searchsorted(cuts, t_ns[beats]) + offset
        found.append(cuts)
        offset += len(cuts)  # one more than there are cells: the last cell of a rank is empty, as between equal cuts
    cells = np.concatenate(found) if found else np.zeros(0, np.int64)
    ends = np.concatenate([np.append(cuts[1:], cuts[-1]) for cuts in found]) if found else cells
    tile = (cells - window.t0_ns) // max(window.width_ns, 1)
    tile[(tile < 0) | (tile >= window.count)] = -1
    ranks = np.repeat(np.arange(len(found)), [len(cuts) for cuts in found])
    return _Cells(ranks, cells, ends, tile), first, last, where


def _cut(cells: _Cells, begin: Int64, end: Int64, first: Int64, last: Int64) -> _Pieces:
    count = np.where(end > begin, last - first + 1, 0)
    source = np.repeat(np.arange(len(begin)), count)
    cell = first[source] + np.arange(len(source)) - (np.cumsum(count) - count)[source]
    return _Pieces(source, cell, np.maximum(begin[source], cells.begin[cell]), np.minimum(end[source], cells.end[cell]))


class _Totals:
    """Time by tile, rank and class; waits also by the rank waited for."""

    def __init__(self, num_tiles: int, num_ranks: int) -> None:
        self.shape = num_tiles, num_ranks
        self.plain = np.zeros((num_tiles * num_ranks, NUM_CLASSES), np.int64)
        self._waits: list[tuple[Int64, Int64]] = []

    def place(self, cells: _Cells) -> Int64:
        """Return each cell's place in `plain`, -1 outside the tiles."""
        place: Int64 = np.where(cells.tile >= 0, cells.tile * self.shape[1] + cells.rank, -1)
        return place

    def add(self, place: Int64, cls: Int64, on: Int64, ns: Int64) -> None:
        inside = place >= 0
        waits = inside & (on != NOBODY)
        plain = inside & ~waits
        np.add.at(self.plain, (place[plain], cls[plain]), ns[plain])
        self._waits.append(
            ((place[waits] * NUM_CLASSES + cls[waits]) * NUM_ON + on[waits] - NOBODY, ns[waits]),
        )

    def add_plain(self, place: Int64, cls: int, ns: Int64) -> None:
        np.add.at(self.plain[:, cls], place[place >= 0], ns[place >= 0])

    def waits(self) -> tuple[Int64, Int64, Int64, Int64]:
        """Return (place, class, whom for, ns) of the waits."""
        keys = np.concatenate([keys for keys, _ in self._waits])
        keys, at = np.unique(keys, return_inverse=True)
        ns = np.zeros(len(keys), np.int64)
        np.add.at(ns, at.reshape(-1), np.concatenate([ns for _, ns in self._waits]))
        return keys // (NUM_ON * NUM_CLASSES), keys // NUM_ON % NUM_CLASSES, keys % NUM_ON + NOBODY, ns

    def of(self, *classes: int) -> Int64:
        """Return the time in some classes by place, waits for anybody included."""
        place, cls, _, ns = self.waits()
        found: Int64 = self.plain[:, list(classes)].sum(axis=1)
        wanted = np.isin(cls, classes)
        np.add.at(found, place[wanted], ns[wanted])
        return found

    def sums(self, width_ns: int, overlap_ns: Int64, unattributed_ns: Int64) -> Sums:
        waits = self.waits()
        recorded = self.plain.sum(axis=1)
        np.add.at(recorded, waits[0], waits[3])
        self.plain[:, _UNRECORDED] += width_ns - recorded
        place, cls = np.nonzero(self.plain)
        plain = place, cls, np.full(len(place), NOBODY), self.plain[place, cls]
        place, cls, on, ns = (np.concatenate(pair) for pair in zip(plain, waits, strict=True))
        order = np.lexsort((on, cls, place))
        place, cls, on, ns = (column[order[ns[order] != 0]] for column in (place, cls, on, ns))
        tile, rank = place // max(self.shape[1], 1), place % max(self.shape[1], 1)
        return Sums(tile, rank, cls, on, ns, overlap_ns.reshape(self.shape), unattributed_ns.reshape(self.shape))


class _Idle:
    """When the first stage was idle: then there was no work anywhere, so nobody waited for work."""

    def __init__(self, rows: Intervals, pieces: _Pieces, cells: _Cells, grid: Grid, num_tiles: int) -> None:
        rank, tile = cells.rank[pieces.cell], cells.tile[pieces.cell]
        speaker = _speakers(rank, tile, grid, num_tiles)
        idle = (rows.cls[pieces.source] == IntervalClass.IDLE) & (tile >= 0) & (rank == speaker[tile])
        order = np.argsort(pieces.begin[idle], kind="stable")
        self._begin, self._end = pieces.begin[idle][order], pieces.end[idle][order]
        self._before = np.concatenate([[0], np.cumsum(self._end - self._begin)])

    def within(self, begin: Int64, end: Int64) -> Int64:
        """Return how much of each stretch was idle."""
        return self._until(end) - self._until(begin)

    def _until(self, t_ns: Int64) -> Int64:
        if not len(self._begin):
            return np.zeros(len(t_ns), np.int64)
        at = np.searchsorted(self._begin, t_ns, side="right") - 1
        inside = np.minimum(t_ns, self._end[at]) - self._begin[at]
        return np.where(at >= 0, self._before[at] + inside, 0)


def _speakers(rank: Int64, tile: Int64, grid: Grid, num_tiles: int) -> Int64:
    """Return for each tile the first rank (its place) of the first stage with any interval in it, or none's."""
    found = np.full(num_tiles, len(grid.ranks))
    spoke = (tile >= 0) & (grid.stages[rank] == grid.first_stage)
    np.minimum.at(found, tile[spoke], rank[spoke])
    return found


def _move_contended(
    totals: _Totals,
    rows: Intervals,
    cls: Int64,
    pieces: _Pieces,
    cells: _Cells,
    delays: Delays,
    where: tuple[Int64, Int64],
    known: tuple[int, int],
) -> None:
    """Move run-queue delay out of compute and host, to where the thread was off its core: at most that much."""
    begin, end = np.clip(delays.begin, *known), np.clip(delays.end, *known)
    real = (end > begin) & (delays.waited > 0)
    if not real.any():
        return
    rate = 1.0 - np.clip(rows.cpu / np.maximum(rows.end - rows.begin, 1), 0.0, 1.0)
    off = np.zeros((len(cells.rank), 2), np.int64)
    for column, wanted in enumerate((_COMPUTE, _HOST)):
        these = pieces.only(cls[pieces.source] == wanted)
        amount = np.rint((these.end - these.begin) * rate[these.source]).astype(np.int64)
        np.add.at(off[:, column], these.cell, amount)
    before = np.concatenate([[0], np.cumsum(off.sum(axis=1))])
    share = (end - begin)[real] / np.maximum(delays.end - delays.begin, 1)[real]
    first, after = where[0][real], where[1][real]
    total = before[after] - before[first]
    taken = np.minimum(delays.waited[real] * share, total) / np.maximum(total, 1)
    which = np.repeat(np.arange(len(first)), after - first)
    cell = first[which] + np.arange(len(which)) - (np.cumsum(after - first) - (after - first))[which]
    place = totals.place(cells)[cell]
    inside = place >= 0
    for column, wanted in enumerate((_COMPUTE, _HOST)):
        moved = np.bincount(
            place[inside], (off[cell, column] * taken[which])[inside], minlength=len(totals.plain)
        ).astype(np.int64)
        moved = np.minimum(moved, totals.plain[:, wanted])
        totals.plain[:, wanted] -= moved
        totals.plain[:, _CONTENDED] += moved


def _overlaps(rows: Intervals, taken_until: Int64, totals: _Totals, window: Window) -> Int64:
    """Return by (tile, rank) what an interval lost to one that began earlier."""
    found = np.zeros(totals.shape, np.int64)
    edges = window.edges
    lost = np.flatnonzero(taken_until > np.maximum(rows.begin, window.known[0]))
    begin, end = rows.begin[lost], np.minimum(rows.end[lost], taken_until[lost])
    first = np.clip(np.searchsorted(edges, begin, side="right") - 1, 0, window.count)
    count = np.maximum(np.clip(np.searchsorted(edges, end, side="left"), 0, window.count) - first, 0)
    source = np.repeat(np.arange(len(lost)), count)
    tile = first[source] + np.arange(len(source)) - (np.cumsum(count) - count)[source]
    ns = np.minimum(end[source], edges[tile + 1]) - np.maximum(begin[source], edges[tile])
    np.add.at(found, (tile, rows.rank[lost][source]), np.maximum(ns, 0))
    return found


def _doubtful(
    rows: Intervals, cls: Int64, pieces: _Pieces, place: Int64, grid: Grid, idle: _Idle, totals: _Totals
) -> Int64:
    """Return by place how much of a receive lies within the clock error of where its wait ends and transfer begins."""
    found = np.zeros(len(totals.plain), np.int64)
    if grid.one_clock:
        return found
    waits = (rows.cls == IntervalClass.RECV_WAIT) & (cls == _UPSTREAM)
    mine = np.flatnonzero((waits | (rows.cls == IntervalClass.RECV_XFER))[pieces.source] & (place >= 0))
    source = pieces.source[mine]
    length = rows.end[source] - rows.begin[source]
    split = np.where(waits[source], rows.end[source], rows.begin[source])
    error = np.minimum(errors_of(rows.rank[source], rows.peer[source], split, grid), length)
    begin = np.where(waits[source], rows.end[source] - error, rows.begin[source])
    end = np.minimum(begin + error, pieces.end[mine])
    begin = np.minimum(np.maximum(begin, pieces.begin[mine]), end)
    np.add.at(found, place[mine], end - begin - np.where(waits[source], idle.within(begin, end), 0))
    np.minimum(found, totals.of(_UPSTREAM, _TRANSFER), out=found)
    return found
