"""Stretches of time laid over each other: what covers each moment, and how often. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from insitu_collector.clocks.timeline import Int64


@dataclass(frozen=True, slots=True)
class Cover:
    """Disjoint pieces, sorted by (key, begin), none empty: from the first begin to the last end of each key."""

    key: Int64
    begin: Int64
    end: Int64
    depth: Int64
    """How many stretches hold in a piece; 0 between stretches."""
    total: Int64
    """The sum of their numbers: where `depth` is 1, which one it is."""
    begun: Int64
    """The number of a stretch that begins with the piece; -1 where it begins because another ended."""


def cover(key: Int64, begin: Int64, end: Int64) -> Cover:
    """Return what n stretches cover, each key by itself. A stretch's number is its place; empty ones cover none."""
    number = np.flatnonzero(end > begin)
    numbers, up = np.tile(number, 2), np.repeat(np.array([1, -1]), len(number))
    keys, times = np.tile(key[number], 2), np.concatenate([begin[number], end[number]])
    order = np.lexsort((up, times, keys))  # at one moment ends come first
    keys, times, up, numbers = keys[order], times[order], up[order], numbers[order]
    depth, total = np.cumsum(up), np.cumsum(up * numbers)
    kept = np.flatnonzero((keys[1:] == keys[:-1]) & (times[1:] > times[:-1]))
    begun = np.where(up > 0, numbers, -1)
    return Cover(keys[kept], times[kept], times[kept + 1], depth[kept], total[kept], begun[kept])


def expand(start: Int64, count: Int64) -> tuple[Int64, Int64]:
    """Return, for ranges `start .. start + count - 1`, which range each member is of, and the members."""
    of = np.repeat(np.arange(len(count)), count)
    offset = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    return of, np.repeat(start, count) + offset
