"""Tiles of the rank ledger as one array, of which grid, breakdown and heat map are sums. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from insitu.vocabulary import LedgerClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.tile import Tile
from insitu_collector.ledger.window import CLASSES

Shares = dict[LedgerClass, float]


@dataclass(frozen=True, slots=True)
class Times:
    """Where the time of some ranks went, tile by tile."""

    t0_ns: Int64
    """int64[num_tiles]: begins."""
    t1_ns: Int64
    """int64[num_tiles]: ends."""
    ns: Int64
    """int64[num_tiles, num_ranks, num_classes], classes in the order of `LedgerClass`."""


def times_of(tiles: Sequence[Tile], ranks: Sequence[int]) -> Times:
    """Return tiles as one array. `ranks`: in the order wanted, all that any tile knows; one that it does not has 0."""
    ns = np.zeros((len(tiles), len(ranks), len(CLASSES)), np.int64)
    if tiles and ranks:
        rank = np.concatenate([tile.grid.ranks[tile.rank] for tile in tiles])
        cls, took = (np.concatenate([getattr(tile, name) for tile in tiles]) for name in ("cls", "ns"))
        order = np.argsort(ranks)
        place = order[np.searchsorted(ranks, rank, sorter=order)]
        np.add.at(ns, (np.repeat(np.arange(len(tiles)), [len(tile.ns) for tile in tiles]), place, cls), took)
    edges = np.array([(tile.t0_ns, tile.t1_ns) for tile in tiles], np.int64).reshape(-1, 2)
    return Times(edges[:, 0], edges[:, 1], ns)


def shares(ns: Int64) -> Shares:
    """Return each class's share of int64[num_classes], largest first; empty without any time."""
    total = int(ns.sum())
    order = np.argsort(-ns, kind="stable")
    return {CLASSES[at]: int(ns[at]) / total for at in order.tolist() if ns[at]}
