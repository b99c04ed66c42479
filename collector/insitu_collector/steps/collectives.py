"""Collectives of a group of ranks: who came late to each, by what the others waited. Pure.

All ranks leave a collective together, so who waited least came last. Waits are lengths on one clock each: no clock of
another host enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.rows.tape import Columns

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Collectives:
    """Collectives in which all ranks of a group took part, one row each, by step and order within it."""

    ranks: tuple[int, ...]
    step: Int64
    t_ns: Int64
    """When the first of the ranks came."""
    wait_ns: Float64
    """float64[num_collectives, num_ranks]"""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def late(self) -> Int64:
        """The column of the rank that came last to each."""
        last: Int64 = np.argmin(self.wait_ns, axis=1).astype(np.int64)
        return last

    def lateness_ns(self) -> Float64:
        """Return how much later each rank came than the median of the others, float64[num_collectives, num_ranks]."""
        return np.stack(
            [np.median(np.delete(self.wait_ns, at, 1), axis=1) - self.wait_ns[:, at] for at in range(len(self.ranks))],
            axis=1,
        )

    def held_ns(self) -> Float64:
        """Return how much sooner each would have ended, had one rank (the column) come with the next to last.

        Negative where the rank was not last: by how much it was before the last, so that sums over steps do not take
        the noise of a healthy group for a gain.
        """
        return np.stack(
            [np.delete(self.wait_ns, at, 1).min(axis=1) - self.wait_ns[:, at] for at in range(len(self.ranks))], axis=1
        )


def collectives_of(intervals: Columns, ranks: Sequence[int]) -> Collectives:
    """Return the collectives of a group; intervals: columns `rank`, `cls`, `step`, `t0`, `t`.

    The n-th `collective_wait` of a step on one rank is the n-th on every other. Steps in which the ranks do not count
    alike (rows on their way, lost, or cut by a collector's pause) are left out: whose n-th is whose is not known there.
    """
    ranks = tuple(sorted(ranks))
    mine = (intervals["cls"] == IntervalClass.COLLECTIVE_WAIT) & (intervals["step"] >= 0)
    mine &= np.isin(intervals["rank"], ranks)
    rank, step, t0, t1 = (intervals[name][mine] for name in ("rank", "step", "t0", "t"))
    order = np.lexsort((t0, step, rank))
    rank, step, t0, t1 = rank[order], step[order], t0[order], t1[order]
    keys, row = np.unique(np.stack([step, _ordinals(rank, step)]), axis=1, return_inverse=True)
    row = row.reshape(-1)
    column = np.searchsorted(ranks, rank)
    wait = np.full((keys.shape[1], len(ranks)), np.nan)
    wait[row, column] = t1 - t0
    came = np.full(keys.shape[1], np.iinfo(np.int64).max)
    np.minimum.at(came, row, t0)
    unlike = np.unique(keys[0][np.isnan(wait).any(axis=1)])
    whole = ~np.isin(keys[0], unlike)
    return Collectives(ranks, keys[0][whole], came[whole], wait[whole])


def _ordinals(rank: Int64, step: Int64) -> Int64:
    """Return 0, 1, ... within each run of equal (rank, step) of sorted rows."""
    place = np.arange(len(rank))
    begins = np.ones(len(rank), bool)
    begins[1:] = (rank[1:] != rank[:-1]) | (step[1:] != step[:-1])
    return place - np.maximum.accumulate(np.where(begins, place, 0)) if len(rank) else place


def by_step(collectives: Collectives, values: Float64) -> tuple[Int64, Int64, Float64]:
    """Return (step, time of its first collective, sum of `values` over its collectives), by time."""
    steps, place = np.unique(collectives.step, return_inverse=True)
    total = np.zeros((len(steps), values.shape[1]))
    np.add.at(total, place.reshape(-1), values)
    t_ns = np.full(len(steps), np.iinfo(np.int64).max)
    np.minimum.at(t_ns, place.reshape(-1), collectives.t_ns)
    order = np.argsort(t_ns, kind="stable")
    return steps[order], t_ns[order], total[order]


def groups(stages: dict[int, int]) -> list[tuple[int, ...]]:
    """Return the ranks of each stage that has several, by stage: they meet in its collectives."""
    found: dict[int, list[int]] = {}
    for rank, stage in sorted(stages.items()):
        found.setdefault(stage, []).append(rank)
    return [tuple(ranks) for _, ranks in sorted(found.items()) if len(ranks) > 1]
