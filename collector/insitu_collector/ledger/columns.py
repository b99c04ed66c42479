"""What the rank ledger's sweep takes and gives: columns of numpy, one entry a row. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import Int64

Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of one length."""

    def only(self, wanted: Bool | Int64) -> Self:
        if wanted.dtype == np.bool_ and wanted.all():
            return self
        return type(self)(*(getattr(self, item.name)[wanted] for item in fields(self)))


@dataclass(frozen=True, slots=True)
class Intervals(Columns):
    """Intervals of any ranks in any order, int64 each, times on one timeline."""

    rank: Int64
    """A place in the ranks of the `Grid`."""
    begin: Int64
    end: Int64
    cls: Int64
    peer: Int64
    cpu: Int64
    seq: Int64
    """Orders rows of one rank that begin at once; any number where nothing is known."""


@dataclass(frozen=True, slots=True)
class Delays(Columns):
    """Stretches between two heartbeats of one epoch, and the run-queue delay that grew in each. By rank, then time."""

    rank: Int64
    begin: Int64
    end: Int64
    waited: Int64


@dataclass(frozen=True, slots=True)
class Grid:
    """The ranks, ascending, each with its stage."""

    ranks: Int64
    stages: Int64
    one_clock: bool
    """Whether all processes read one clock; then no `errors_ns` is asked for."""
    errors_ns: Callable[[int, int, Int64], Int64 | None]
    """(rank, peer, times) -> how far their clocks may be apart then, None if that is not known."""

    @property
    def first_stage(self) -> int:
        return int(self.stages.min()) if len(self.stages) else 0


@dataclass(frozen=True, slots=True)
class Window:
    """`count` tiles of `width_ns` from `t0_ns` on, and the stretch in which all rows are known (at least the tiles)."""

    t0_ns: int
    width_ns: int
    count: int = 1
    known_from_ns: int | None = None
    known_to_ns: int | None = None

    @property
    def known(self) -> tuple[int, int]:
        end = self.t0_ns + self.width_ns * self.count
        return (
            self.t0_ns if self.known_from_ns is None else min(self.known_from_ns, self.t0_ns),
            end if self.known_to_ns is None else max(self.known_to_ns, end),
        )

    @property
    def edges(self) -> Int64:
        return self.t0_ns + self.width_ns * np.arange(self.count + 1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Sums:
    """One entry for each (tile, rank, class, whom a wait waits for) with any time, in that order."""

    tile: Int64
    rank: Int64
    cls: Int64
    on: Int64
    """The rank waited for, or `NOBODY`."""
    ns: Int64
    overlap_ns: Int64
    """int64[num_tiles, num_ranks]: what more than one interval claimed."""
    unattributed_ns: Int64
    """int64[num_tiles, num_ranks]: the part of wait_upstream + transfer within a clock error of the split."""
