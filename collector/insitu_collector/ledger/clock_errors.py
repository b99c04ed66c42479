"""By how much the clocks of ranks that wait for each other may be off. Pure numpy."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np

from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.classes import NOBODY
from insitu_collector.ledger.columns import Grid

NUM_ON: Final = 1 << 17
"""More than there are values of an int16 peer, from `NOBODY` up."""


def errors_of(rank: Int64, peer: Int64, t_ns: Int64, grid: Grid) -> Int64:
    """Return the clock error between each rank and its peer at a time, the largest number where it is unknown."""
    keys = rank * NUM_ON + peer - NOBODY
    order = np.argsort(keys, kind="stable")
    found = np.full(len(keys), np.iinfo(np.int64).max)
    for here in by_rank(keys[order]):
        rows = order[here]
        key = int(keys[rows[0]])
        errors = grid.errors_ns(int(grid.ranks[key // NUM_ON]), key % NUM_ON + NOBODY, t_ns[rows])
        if errors is not None:
            found[rows] = errors
    return found


def by_rank(rank: Int64) -> list[slice]:
    """Return the stretches of one rank (or pair of ranks) each in a sorted column."""
    edges = [0, *(np.flatnonzero(np.diff(rank)) + 1).tolist(), len(rank)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
