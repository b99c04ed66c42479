"""The rank x rank delay matrix, and the four classes of fault that C4D tells apart by it. Pure.

C4D (Dong et al., HPCA 2025, arXiv 2406.04594, section 3) lays each pair's transfer times out as a matrix, source by
destination: one cell that stands out is a slow link, a row or a column that does is the sender or the receiver. What
hangs or is slow inside a transport is a fault of communication; what comes late to it is one of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.collectives import collectives_of, groups

Float64 = NDArray[np.float64]

MIN_MESSAGES: Final = 20
"""Of a pair, before it is compared: fewer have no median to speak of."""
MIN_SLOW_NS: Final = 500_000.0
"""A link whose typical message takes this much longer than other pairs' is slow: five times what handing 16 KB to a
loopback socket takes (100 us)."""
SLOW_SHARE: Final = 1.0
"""... if that also doubles the transfer: on shared cores either end may be kept from its core in the middle of one."""


class FaultClass(StrEnum):
    """C4D's four, as verdicts name them."""

    COMMUNICATION_HANG = "communication hang"
    OTHER_HANG = "non-communication hang"
    COMMUNICATION_SLOW = "communication slow"
    OTHER_SLOW = "non-communication slow"


_INSIDE: Final = (
    IntervalClass.RECV_WAIT,
    IntervalClass.RECV_XFER,
    IntervalClass.SEND_WAIT,
    IntervalClass.SEND_XFER,
    IntervalClass.COLLECTIVE_WAIT,
)


def hang_class(open_cls: int | None) -> FaultClass:
    """Return the class of a hang by what the rank at the end of the chain of waits is in."""
    return FaultClass.COMMUNICATION_HANG if open_cls in _INSIDE else FaultClass.OTHER_HANG


@dataclass(frozen=True, slots=True)
class DelayMatrix:
    """Delays of one window. Matrices are float64 or int64 [num_ranks, num_ranks], in the order of `ranks`."""

    ranks: tuple[int, ...]
    transfer_ns: Float64
    """[source, destination]: what a typical message takes beyond the typical of all pairs; nan: nothing to compare.

    Typical is the lower quartile of the pairs' medians for messages of that size: one rank's links are half of all
    links or more where ranks are few.
    """
    typical_ns: Float64
    """[source, destination]: that lower quartile."""
    num_messages: Int64
    """[source, destination]: point to point, as the end saw them that saw more."""
    waiting_ns: Float64
    """[waited for, waiting]: a step, point to point and in collectives."""

    @property
    def slow(self) -> NDArray[np.bool_]:
        """The links that are slow, [source, destination]."""
        with np.errstate(invalid="ignore"):
            found: NDArray[np.bool_] = self.transfer_ns >= np.maximum(MIN_SLOW_NS, SLOW_SHARE * self.typical_ns)
        return found & (self.num_messages >= MIN_MESSAGES)


@dataclass(frozen=True, slots=True)
class Pattern:
    """What the slow links have in common."""

    kind: str
    """ "link", "sender" (a row), "receiver" (a column) or "rank" (both)."""
    rank: int
    """The source of a link; else whose links they are."""
    peer: int | None
    """The destination of a link."""
    delay_ns: float
    """Of a typical message, at the worst of its links."""


def delay_matrix(intervals: Columns, stages: Mapping[int, int]) -> DelayMatrix:
    """Return the matrix of intervals with the columns `rank, peer, cls, step, t0, t, bytes`; stages: rank -> stage."""
    ranks = np.array(sorted(stages), np.int64)
    known = np.isin(intervals["rank"], ranks)
    rows = {name: column[known] for name, column in intervals.items()}
    transfer, typical, messages = _transfers(rows, ranks)
    return DelayMatrix(tuple(ranks.tolist()), transfer, typical, messages, _waiting(rows, ranks, dict(stages)))


def _transfers(rows: Columns, ranks: Int64) -> tuple[Float64, Float64, Int64]:
    """Return (excess, typical, number) of a message, [source, destination]; both ends' parts of it are added up."""
    size = len(ranks)
    excess, usual = np.full((2, size, size), np.nan), np.full((2, size, size), np.nan)
    counted = np.zeros((2, size, size), np.int64)
    for end, cls in enumerate((IntervalClass.SEND_XFER, IntervalClass.RECV_XFER)):
        mine = (rows["cls"] == cls) & np.isin(rows["peer"], ranks)
        at, peer = (np.searchsorted(ranks, rows[name][mine]) for name in ("rank", "peer"))
        pair = at * size + peer if cls == IntervalClass.SEND_XFER else peer * size + at
        ns = (rows["t"] - rows["t0"])[mine].astype(np.float64)
        counted[end] = np.bincount(pair, minlength=size * size).reshape(size, size)
        excess[end], usual[end] = _compared(ns, pair, np.frexp(rows["bytes"][mine].astype(np.float64))[1], size)
    nothing = np.isnan(excess).all(axis=0)
    return np.where(nothing, np.nan, np.nansum(excess, axis=0)), np.nansum(usual, axis=0), counted.max(axis=0)


def _compared(ns: Float64, pair: Int64, octave: NDArray[np.int32], size: int) -> tuple[Float64, Float64]:
    """Return what messages of each pair take beyond the typical of their size, and that typical.

    octave: the power of two of a message's size; sizes within one are alike.
    """
    excess, usual, compared = np.zeros(size * size), np.zeros(size * size), np.zeros(size * size)
    for alike in np.unique(octave):
        medians, counts = _medians(ns[octave == alike], pair[octave == alike], size * size)
        there = counts > 0
        if there.sum() < 2:
            continue
        ordered = np.sort(medians[there])
        typical = ordered[(len(ordered) - 1) // 4]
        excess[there] += counts[there] * (medians[there] - typical)
        usual[there] += counts[there] * typical
        compared += counts
    per = np.where(compared > 0, compared, np.nan)
    return (excess / per).reshape(size, size), (usual / per).reshape(size, size)


def _medians(ns: Float64, pair: Int64, num_pairs: int) -> tuple[Float64, Int64]:
    """Return the median and the number of each pair's messages."""
    ns = ns[np.lexsort((ns, pair))]
    counts = np.bincount(pair, minlength=num_pairs).astype(np.int64)
    begin, there = np.cumsum(counts) - counts, counts > 0
    found = np.full(num_pairs, np.nan)
    found[there] = (ns[(begin + (counts - 1) // 2)[there]] + ns[(begin + counts // 2)[there]]) / 2
    return found, counts


def _waiting(rows: Columns, ranks: Int64, stages: dict[int, int]) -> Float64:
    size = len(ranks)
    total = np.zeros((size, size))
    waits = np.isin(rows["cls"], (IntervalClass.RECV_WAIT, IntervalClass.SEND_WAIT)) & np.isin(rows["peer"], ranks)
    at, peer = (np.searchsorted(ranks, rows[name][waits]) for name in ("rank", "peer"))
    np.add.at(total, (peer, at), (rows["t"] - rows["t0"])[waits])
    for group in groups(stages):
        met = collectives_of(rows, group)
        beyond = met.wait_ns - met.wait_ns.min(axis=1, keepdims=True) if len(met) else met.wait_ns
        place = np.searchsorted(ranks, group)
        np.add.at(total, (place[met.late][:, None], place[None, :]), beyond)
    pairs = np.unique(np.stack([rows["rank"], rows["step"]])[:, rows["step"] >= 0], axis=1)
    steps = np.bincount(np.searchsorted(ranks, pairs[0]), minlength=size)
    return total / np.maximum(steps, 1)[None, :]


def patterns(matrix: DelayMatrix) -> list[Pattern]:
    """Return what the slow links have in common: all of a rank's, all it sends or receives over, or single ones.

    A row or a column is blamed only where it has two links or more; its links are then not told again.
    """
    slow, known = matrix.slow, (matrix.num_messages >= MIN_MESSAGES) & ~np.isnan(matrix.transfer_ns)
    sends = [bool(known[at].sum() >= 2 and (slow[at] == known[at]).all()) for at in range(len(matrix.ranks))]
    gets = [bool(known[:, at].sum() >= 2 and (slow[:, at] == known[:, at]).all()) for at in range(len(matrix.ranks))]
    found, left = [], slow.copy()
    for at, rank in enumerate(matrix.ranks):
        if not sends[at] and not gets[at]:
            continue
        kind = "rank" if sends[at] and gets[at] else "sender" if sends[at] else "receiver"
        mine = np.zeros_like(slow)
        mine[at] |= sends[at]
        mine[:, at] |= gets[at]
        if (left & mine).any():
            found.append(Pattern(kind, rank, None, float(matrix.transfer_ns[slow & mine].max())))
        left &= ~mine
    for source, target in np.argwhere(left):
        delay = float(matrix.transfer_ns[source, target])
        found.append(Pattern("link", matrix.ranks[source], matrix.ranks[target], delay))
    return sorted(found, key=lambda pattern: -pattern.delay_ns)
