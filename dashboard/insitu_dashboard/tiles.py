"""Where each rank's time went, a second at a time: the rank ledger in tiles that add up. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger import rank_ledger

TILE_NS: Final = 1_000_000_000

Shares = dict[LedgerClass, float]


@dataclass(frozen=True, slots=True)
class Tile:
    """One second: rank -> class -> nanoseconds, which sum to the second for each rank."""

    t0_ns: int
    ns: Mapping[int, Mapping[LedgerClass, int]]


def tile(intervals: pa.Table, health: pa.Table, sources: pa.Table, t0_ns: int, clocks: pa.Table | None = None) -> Tile:
    """Return the tile that begins at `t0_ns` (on the timeline of `sources` and `clocks`), from rows that touch it."""
    ledger = rank_ledger(intervals, health, sources, t0_ns, t0_ns + TILE_NS, clocks)
    ns: dict[int, dict[LedgerClass, int]] = {rank: {} for rank in ledger.ranks}
    for row in ledger.rows:
        of_rank = ns[row.rank]
        of_rank[row.cls] = of_rank.get(row.cls, 0) + row.ns
    return Tile(t0_ns, ns)


def shares(tiles: Iterable[Tile], ranks: Iterable[int]) -> Shares:
    """Return each class's share of the time of some ranks, largest first; empty without any time."""
    wanted = frozenset(ranks)
    sums: dict[LedgerClass, int] = {}
    for each in tiles:
        for rank, classes in each.ns.items():
            if rank in wanted:
                for cls, ns in classes.items():
                    sums[cls] = sums.get(cls, 0) + ns
    total = sum(sums.values())
    ordered = sorted(sums, key=lambda cls: -sums[cls])
    return {cls: sums[cls] / total for cls in ordered} if total else {}
