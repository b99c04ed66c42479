"""A tile of the rank ledger: where each rank's time went in one stretch of 100 ms, 1 s or 10 s. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.classes import NOBODY
from insitu_collector.ledger.columns import Grid, Sums, Window
from insitu_collector.ledger.window import Ledger, ledger_of

_NUM_CLASSES: Final = 1 << 8
_NUM_ON: Final = 1 << 17
"""More than there are values of an int16 peer, from `NOBODY` up."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Entries of one length by rank, class and whom a wait waits for; a rank's `ns` sum to the width exactly."""

    t0_ns: int
    width_ns: int
    grid: Grid
    rank: NDArray[np.int16]
    """A place in `grid.ranks`."""
    cls: NDArray[np.int8]
    """A place in `LedgerClass`."""
    on: NDArray[np.int32]
    """The rank waited for, or `NOBODY`."""
    ns: Int64
    overlap_ns: Int64
    """int64[num_ranks], as `Ledger.overlap_ns`."""
    unattributed_ns: Int64
    """int64[num_ranks], as `Ledger.unattributed_ns`."""

    @property
    def t1_ns(self) -> int:
        return self.t0_ns + self.width_ns

    def ledger(self) -> Ledger:
        """Return the same as a ledger of this stretch."""
        rank, cls, on = (column.astype(np.int64) for column in (self.rank, self.cls, self.on))
        sides = self.overlap_ns[None], self.unattributed_ns[None]
        sums = Sums(np.zeros(len(self.ns), np.int64), rank, cls, on, self.ns, *sides)
        return ledger_of(sums, self.grid, self.t0_ns, self.t1_ns)


def tiles_of(sums: Sums, grid: Grid, window: Window) -> list[Tile]:
    """Return a tile for each of the window's, in order."""
    edges = np.searchsorted(sums.tile, np.arange(window.count + 1)).tolist()
    rank, cls, on = sums.rank.astype(np.int16), sums.cls.astype(np.int8), sums.on.astype(np.int32)
    found = []
    for place, t0_ns in enumerate(window.edges[:-1].tolist()):
        mine = slice(edges[place], edges[place + 1])
        columns = rank[mine].copy(), cls[mine].copy(), on[mine].copy(), sums.ns[mine].copy()  # views would keep all
        sides = sums.overlap_ns[place].copy(), sums.unattributed_ns[place].copy()
        found.append(Tile(t0_ns, window.width_ns, grid, *columns, *sides))
    return found


def summed(tiles: Sequence[Tile]) -> Tile:
    """Return neighbouring tiles as one: every number is the exact sum of theirs."""
    grid = tiles[-1].grid
    if any(tile.grid is not grid and not np.isin(tile.grid.ranks, grid.ranks).all() for tile in tiles):
        grid = max((tile.grid for tile in tiles), key=lambda grid: len(grid.ranks))
    places = [np.searchsorted(grid.ranks, tile.grid.ranks) for tile in tiles]
    rank = np.concatenate([place[tile.rank] for place, tile in zip(places, tiles, strict=True)])
    cls, on = (np.concatenate([getattr(tile, name) for tile in tiles]).astype(np.int64) for name in ("cls", "on"))
    keys, at = np.unique((rank * _NUM_CLASSES + cls) * _NUM_ON + on - NOBODY, return_inverse=True)
    ns, sides = np.zeros(len(keys), np.int64), np.zeros((2, len(grid.ranks)), np.int64)
    np.add.at(ns, at.reshape(-1), np.concatenate([tile.ns for tile in tiles]))
    for place, tile in zip(places, tiles, strict=True):
        sides[:, place] += tile.overlap_ns, tile.unattributed_ns
    rank, cls, on = keys // (_NUM_CLASSES * _NUM_ON), keys // _NUM_ON % _NUM_CLASSES, keys % _NUM_ON + NOBODY
    width_ns = sum(tile.width_ns for tile in tiles)
    columns = rank.astype(np.int16), cls.astype(np.int8), on.astype(np.int32), ns
    return Tile(tiles[0].t0_ns, width_ns, grid, *columns, *sides)
