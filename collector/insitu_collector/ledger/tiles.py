"""The rank ledger as it grows: rows go in as they come, tiles of 100 ms, 1 s and 10 s come out. No clock.

A tile is a function of the rows that touch it, so neither their order nor how they were cut into batches matters.
It is made once every rank has reported past it, made again when rows come late, and final `late_ns` after it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import pyarrow as pa

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK
from insitu_collector.clocks.timeline import Int64, Timeline, timeline_of
from insitu_collector.ledger.columns import Grid, Intervals, Window
from insitu_collector.ledger.held_rows import LONGEST_BEAT_NS, HeldBeats, HeldIntervals
from insitu_collector.ledger.rows import beats_of, grid_of, intervals_of, joined, placed
from insitu_collector.ledger.sweep import tile_sums
from insitu_collector.ledger.tile import Tile, summed, tiles_of
from insitu_collector.ledger.window import rank_stages

FINE_NS: Final = 100_000_000
LEVELS_NS: Final = (FINE_NS, 10 * FINE_NS, 100 * FINE_NS)
"""Widths of tiles; each is ten of the one before, and its exact sum."""
KEEP_TILES: Final = dict.fromkeys(LEVELS_NS, 600)
"""Tiles kept of each width, as many as a heat map has columns: the last 60 s, 10 min and 100 min."""
LATE_NS: Final = 30_000_000_000
"""How long after its end a tile still takes rows in. More of it costs memory: 2.2 MB a second at 64 busy ranks."""
SILENT_NS: Final = 3_000_000_000
"""A rank that has reported nothing for so much longer than the others is not waited for."""
HOLD_NS: Final = LONGEST_BEAT_NS
"""Rows are held so much longer than `late_ns`: run-queue delay is spread over the whole time between two heartbeats."""
MOST_ROWS: Final = 2_000_000
"""Rows held at most, about 150 MB; above it tiles become final earlier than `late_ns` after their end."""
MOST_CLOCKS: Final = 2_000
"""Latest comparisons of clocks that are kept."""
_BATCH: Final = 100
"""Tiles made at once. More costs memory, fewer time."""


@dataclass(frozen=True, slots=True)
class Late:
    """What came after its tile was final, or had to be let go before it was made: in no tile, but counted."""

    num_rows: int = 0
    ns: int = 0


class TileLedger:
    """The ledger of one run and replica in tiles; `add` takes new rows, `settle` makes what is due."""

    def __init__(self, late_ns: int = LATE_NS, keep: Mapping[int, int] = KEEP_TILES) -> None:
        self.timeline = Timeline()
        self.stages: dict[int, int] = {}
        """Rank -> stage."""
        self.late = Late()
        self.final_ns: int | None = None
        """Tiles that end here or earlier never change again."""
        self._late_ns = late_ns
        self._keep = {**KEEP_TILES, **keep}
        self._keep[FINE_NS] = max(self._keep[FINE_NS], late_ns // FINE_NS + 100)  # ten of them make one, twice
        self.sources: pa.Table = schema_of("sources").empty_table()
        self._clocks: pa.Table = schema_of("clocks").empty_table()
        self._grid: Grid = grid_of({}, self.sources, self.timeline)
        self._rows = HeldIntervals()
        self._beats = HeldBeats()
        self._opened: dict[int, tuple[int, ...]] = {}
        """Rank -> (begin, end, class, peer) of the interval taken for still open when tiles were last made."""
        self._tiles: dict[int, dict[int, Tile]] = {width_ns: {} for width_ns in LEVELS_NS}
        self._made: tuple[int, int] | None = None
        self._dirty: list[tuple[int, int]] = []
        """Where intervals have changed, and with them what the delay between two heartbeats is spread over."""
        self._respread: list[tuple[int, int]] = []
        """Where heartbeats have changed how delay is spread."""

    def add(self, tables: Mapping[str, pa.Table]) -> None:
        """Take in new rows of `sources`, `clocks`, `intervals` and `health`, in any order; other tables are ignored."""
        names = "sources", "clocks", "intervals", "health"
        sources, clocks, intervals, health = (tables.get(name, schema_of(name).empty_table()) for name in names)
        if sources.num_rows or clocks.num_rows:
            self.sources = pa.concat_tables([self.sources, sources])
            clocks = pa.concat_tables([self._clocks, clocks])
            self._clocks = clocks.slice(max(0, clocks.num_rows - MOST_CLOCKS))
            self._regrid(rank_stages(self.sources), timeline_of(self.sources, self._clocks))
        if health.num_rows:  # before intervals, of which too many at once settle tiles that need heartbeats
            self._respread += self._beats.add(beats_of(health), self.timeline)
        if intervals.num_rows:
            named = rank_stages(schema_of("sources").empty_table(), intervals)
            if not named.keys() <= self.stages.keys():
                self._regrid(named, self.timeline)
            self._take_intervals(intervals)

    @property
    def settled_ns(self) -> int | None:
        """Return up to when every rank that still reports has reported, or None."""
        ranks = self._grid.ranks
        reported = np.maximum(self._rows.last_end(ranks), self._beats.last(ranks))
        reported = reported[reported > np.iinfo(np.int64).min]
        if not len(reported):
            return None
        return int(reported[reported >= reported.max() - SILENT_NS].min())

    @property
    def num_held_rows(self) -> int:
        """Return how many intervals are held, for tiles that are not final."""
        return self._rows.num_rows

    def tiles(self, width_ns: int, t0_ns: int | None = None, t1_ns: int | None = None) -> list[Tile]:
        """Return the tiles of a width (one of `LEVELS_NS`) that are kept and lie in [t0_ns, t1_ns), oldest first."""
        found = self._tiles[width_ns]
        begins = list(found)
        first = 0 if t0_ns is None else bisect_left(begins, t0_ns)
        after = len(begins) if t1_ns is None else bisect_right(begins, t1_ns - width_ns)
        return [found[begin] for begin in begins[first:after]]

    def settle(self, until_ns: int | None = None) -> dict[int, list[Tile]]:
        """Make the tiles that are due and those that rows have changed; return them by width, oldest first.

        until_ns: make tiles up to here rather than up to `settled_ns`.
        """
        until = self.settled_ns if until_ns is None else until_ns
        changed: dict[int, list[Tile]] = {width_ns: [] for width_ns in LEVELS_NS}
        first = self._rows.first_ns
        if until is None or first is None:
            return changed
        opened = self._still_open()
        for t0_ns, t1_ns in self._due(-(-first // FINE_NS) * FINE_NS, until // FINE_NS * FINE_NS):
            for begin in range(t0_ns, t1_ns, _BATCH * FINE_NS):
                count = min(_BATCH, (t1_ns - begin) // FINE_NS)
                changed[FINE_NS] += self._make(opened, begin, count)
        for narrow, wide in pairwise(LEVELS_NS):
            changed[wide] = self._widen(narrow, wide, changed[narrow])
        self._let_go()
        return changed

    # -- what is known -------------------------------------------------------------------------------------------

    def _regrid(self, stages: Mapping[int, int], timeline: Timeline) -> None:
        """Take new ranks and a new timeline; what they change is made again where rows are held."""
        found = dict(sorted({**stages, **self.stages}.items()))
        if found != self.stages:
            self._dirty += [self._made] if self._made else []
        self.stages = found
        if timeline is not self.timeline:
            self._dirty += timeline.differing(self.timeline)
            self.timeline = timeline
            self._dirty += self._rows.move(timeline) + self._beats.move(timeline)
        self._grid = grid_of(found, self.sources, timeline)

    def _take_intervals(self, table: pa.Table) -> None:
        own = intervals_of(table)
        wanted = (own.rank != NO_RANK) & (own.end > own.begin)
        rows = self._rows.add(own.only(wanted), np.asarray(table["epoch"])[wanted], self.timeline)
        if self.final_ns is not None:
            self._count_late(rows, self.final_ns)
        if self._made is not None:
            self._dirty += _stretches(rows.begin, rows.end, *self._made)
        if self._rows.num_rows > MOST_ROWS:
            self.settle()

    def _count_late(self, rows: Intervals, final_ns: int) -> None:
        late = rows.only(rows.begin < final_ns)
        if len(late.rank):
            told = self._beats.long_open  # tiles have what was open at a heartbeat
            pairs = zip(late.rank.tolist(), late.begin.tolist(), strict=True)
            late = late.only(np.array([pair not in told for pair in pairs], bool))
            self._count(len(late.rank), int((np.minimum(late.end, final_ns) - late.begin).sum()))

    def _count(self, num_rows: int, ns: int) -> None:
        self.late = Late(self.late.num_rows + num_rows, self.late.ns + ns)

    # -- tiles ---------------------------------------------------------------------------------------------------

    def _still_open(self) -> Intervals:
        """Return what ranks are in the middle of, and have tiles made again where that is no longer so."""
        found = self._beats.still_open()
        found = found.only(found.begin >= self._rows.last_end(found.rank))
        columns = zip(*(c.tolist() for c in (found.rank, found.begin, found.end, found.cls, found.peer)), strict=True)
        opened = {rank: tuple(rest) for rank, *rest in columns}
        for rank in opened.keys() | self._opened.keys():
            before, after = self._opened.get(rank), opened.get(rank)
            if before and after and (before[0], *before[2:]) == (after[0], *after[2:]):
                self._dirty.append((min(before[1], after[1]), max(before[1], after[1])))
            elif before != after:
                self._dirty += [(each[0], each[1]) for each in (before, after) if each]
        self._opened = opened
        return found

    def _due(self, first_ns: int, until_ns: int) -> list[tuple[int, int]]:
        """Return the stretches of tiles to make, and take note that they are made."""
        oldest = until_ns - max(width * count for width, count in self._keep.items())
        if self._made is None:
            self._made = (max(first_ns, oldest),) * 2
        since, until = self._made
        begin = max(min(first_ns, since), oldest, self.final_ns or oldest)
        self._made = min(begin, since), max(until_ns, until)
        delays = self._beats.delays()
        stretches = [(max(until, oldest), until_ns)] if until_ns > until else []
        stretches += [(begin, since)] if begin < since else []
        for t0_ns, t1_ns in self._dirty:
            touched = (delays.end > t0_ns) & (delays.begin < t1_ns)
            since = min(t0_ns, int(delays.begin[touched].min(initial=t0_ns)))
            stretches.append((since, max(t1_ns, int(delays.end[touched].max(initial=t1_ns)))))
        stretches += self._respread
        self._dirty, self._respread = [], []
        return _merged(stretches, max(self._made[0], self.final_ns or oldest, oldest), self._made[1])

    def _make(self, opened: Intervals, t0_ns: int, count: int) -> list[Tile]:
        t1_ns = t0_ns + count * FINE_NS
        delays = self._beats.delays()
        delays = delays.only((delays.end > t0_ns) & (delays.begin < t1_ns))
        known = int(delays.begin.min(initial=t0_ns)), int(delays.end.max(initial=t1_ns))
        rows = joined([self._rows.between(*known), opened])
        window = Window(t0_ns, FINE_NS, count, *known)
        sums = tile_sums(placed(rows, self._grid), placed(delays, self._grid), self._grid, window)
        made = tiles_of(sums, self._grid, window)
        self._tiles[FINE_NS] |= {tile.t0_ns: tile for tile in made}
        return made

    def _widen(self, narrow_ns: int, wide_ns: int, changed: Iterable[Tile]) -> list[Tile]:
        """Make the wide tiles of which all narrow ones are there and some have changed."""
        narrow, found = self._tiles[narrow_ns], []
        for t0_ns in sorted({tile.t0_ns // wide_ns * wide_ns for tile in changed}):
            parts = [narrow.get(t) for t in range(t0_ns, t0_ns + wide_ns, narrow_ns)]
            whole = [part for part in parts if part is not None]
            if len(whole) == len(parts):
                found.append(summed(whole))
        self._tiles[wide_ns] |= {tile.t0_ns: tile for tile in found}
        return found

    def _let_go(self) -> None:
        """Forget rows whose tiles are final, and tiles that are old."""
        assert self._made is not None, "tiles were made"
        final = self._made[1] - self._late_ns
        while self._rows.num_rows > MOST_ROWS:
            rows = self._rows.let_go_oldest()
            final = max(final, min(int(rows.end.max()), self._made[1]))
            unmade = rows.only(rows.end > self._made[1])
            self._count(len(unmade.rank), int((unmade.end - np.maximum(unmade.begin, self._made[1])).sum()))
        final = final // FINE_NS * FINE_NS
        self.final_ns = final if self.final_ns is None else max(final, self.final_ns)
        self._rows.let_go(self.final_ns - HOLD_NS)
        self._beats.let_go(self.final_ns - 2 * HOLD_NS)
        for width_ns, tiles in self._tiles.items():
            kept = sorted(tiles)[-self._keep[width_ns] :]
            self._tiles[width_ns] = {t0_ns: tiles[t0_ns] for t0_ns in kept}


def _stretches(begin: Int64, end: Int64, t0_ns: int, t1_ns: int) -> list[tuple[int, int]]:
    """Return where any of the rows touch [t0_ns, t1_ns), in whole tiles, merged."""
    inside = (begin < t1_ns) & (end > t0_ns)
    if not inside.any():
        return []
    first = (np.maximum(begin[inside], t0_ns) - t0_ns) // FINE_NS
    after = -((t0_ns - np.minimum(end[inside], t1_ns)) // FINE_NS)
    keys = np.unique(first * 2**31 + after)
    pairs = ((int(key >> 31), int(key & (2**31 - 1))) for key in keys)
    stretches = [(t0_ns + a * FINE_NS, t0_ns + b * FINE_NS) for a, b in pairs]
    return _merged(stretches, t0_ns, t1_ns)


def _merged(stretches: Iterable[tuple[int, int]], t0_ns: int, t1_ns: int) -> list[tuple[int, int]]:
    """Return stretches in whole tiles inside [t0_ns, t1_ns), disjoint, oldest first."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(stretches):
        begin, end = max(begin // FINE_NS * FINE_NS, t0_ns), min(-(-end // FINE_NS) * FINE_NS, t1_ns)
        if end <= begin:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found
