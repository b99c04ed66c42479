"""A few steps of each second of a rank's traffic, kept for ten minutes: what a change that stays is seen in. Pure.

Steps are kept with their shapes, not as one number a second: they are compared with what the baseline expects now, so
that whatever it learns in between moves all seconds alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import Int64
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.baseline import OFF_CORE, Expectation
from insitu_collector.steps.times import StepTimes

Float64 = NDArray[np.float64]

SECOND_NS: Final = 1_000_000_000
MOST_SECONDS: Final = 600
"""Kept of a rank; 64 bytes a step, so 300 KB."""
PER_SECOND: Final = 8
"""Steps kept of a second, evenly spaced; of fewer, some count twice."""
MIN_CELL: Final = 3
"""Steps of one shape, before and after, to be compared."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one rank in which it made steps, by time."""

    second: Int64
    num_steps: Int64
    cpu_ns: Float64
    """float64[num_seconds, PER_SECOND]"""
    off_ns: Float64
    queued_ns: Float64
    """What a step waited for a core, on average, float64[num_seconds]."""
    shape: Float64
    """float64[num_seconds, PER_SECOND, len(SHAPE)]"""

    def __len__(self) -> int:
        return len(self.second)

    def slower(self, expected: Expectation) -> Float64:
        """Return by which share a second's steps took longer than expected, float64[num_seconds].

        As for `stage_limits`: the median on the core; off it the lower quartile, which a preemption does not reach, or
        the mean less what the run queue explains, whichever is smaller. The queue explains at most all of it: its delay
        also counts waits before a step, and a host that others leave would look like one that became slower.
        """
        flat = self.shape.reshape(-1, len(SHAPE))
        on, off = (fit.ns(flat).reshape(self.cpu_ns.shape) for fit in (expected.on_core, expected.off_core))
        blocked = np.maximum((self.off_ns - off).mean(axis=1) - self.queued_ns, 0.0)
        kept = np.minimum(np.quantile(self.off_ns - off, OFF_CORE, axis=1), blocked)
        share: Float64 = (np.median(self.cpu_ns - on, axis=1) + kept) / np.maximum(np.median(on + off, axis=1), 1.0)
        return share

    def expected_ns(self, expected: Expectation) -> float:
        """Return what a typical one of these steps should take."""
        return max(1.0, float(np.median(expected.busy_ns(self.shape.reshape(-1, len(SHAPE))))))


def matched(before: Seconds, after: Seconds) -> tuple[float, float]:
    """Return how many times as long steps of equal shape take after as before, and the share of steps that had a match.

    Shapes are equal when rows, prefill rows, sampled rows and requests are, and the context within an octave.
    """
    keys, place = np.unique(np.concatenate([_cells(before), _cells(after)]), axis=0, return_inverse=True)
    place = place.reshape(-1)
    split = before.cpu_ns.size
    old, new = (_busy(part) for part in (before, after))
    ratios, weights = [], []
    for cell in range(len(keys)):
        mine, theirs = old[place[:split] == cell], new[place[split:] == cell]
        if min(len(mine), len(theirs)) >= MIN_CELL:
            ratios.append(float(np.median(theirs) / max(1.0, np.median(mine))))
            weights.append(len(theirs))
    if not ratios:
        return 1.0, 0.0
    order = np.argsort(ratios)
    middle = np.searchsorted(np.cumsum(np.array(weights)[order]), sum(weights) / 2)
    return ratios[order[middle]], sum(weights) / after.cpu_ns.size


def _cells(seconds: Seconds) -> Float64:
    cells = seconds.shape.reshape(-1, len(SHAPE)).copy()
    context = SHAPE.index("context")
    cells[:, context] = np.floor(np.log2(np.maximum(cells[:, context], 1.0)))
    return cells


def _busy(seconds: Seconds) -> Float64:
    busy: Float64 = (seconds.cpu_ns + np.quantile(seconds.off_ns, OFF_CORE, axis=1)[:, None]).reshape(-1)
    return busy


class StepHistory:
    """The last `MOST_SECONDS` seconds of one rank in which it made steps."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, int, float, Float64, Float64, Float64]] = deque(maxlen=MOST_SECONDS)
        self._taken = -1

    def take(self, steps: StepTimes, until_ns: int, queued_ns: Callable[[int, int], float]) -> None:
        """Take in the seconds that ended before `until_ns`, once each.

        steps: of traffic, by time. queued_ns: what the rank waited for a core between two times.
        """
        second = steps.t_ns // SECOND_NS
        new = (second > self._taken) & ((second + 1) * SECOND_NS <= until_ns)
        for number in np.unique(second[new]).tolist():
            mine = np.flatnonzero(second == number)
            chosen = mine[np.linspace(0, len(mine) - 1, PER_SECOND).round().astype(np.int64)]
            queued = queued_ns(number * SECOND_NS, (number + 1) * SECOND_NS) / len(mine)
            parts = steps.cpu_ns[chosen], steps.off_ns[chosen], steps.shape[chosen]
            self._held.append((number, len(mine), queued, *parts))
            self._taken = number

    def forget(self, t0_ns: int, t1_ns: int) -> None:
        """Let go of the seconds that touch [t0_ns, t1_ns]: something else is known of them."""
        first, last = t0_ns // SECOND_NS, t1_ns // SECOND_NS
        self._held = deque((held for held in self._held if not first <= held[0] <= last), maxlen=MOST_SECONDS)

    def seconds(self) -> Seconds | None:
        """Return what is held, or None for nothing."""
        if not self._held:
            return None
        second, num_steps, queued, cpu, off, shape = zip(*self._held, strict=True)
        counted = np.array(second), np.array(num_steps)
        return Seconds(*counted, np.stack(cpu), np.stack(off), np.array(queued), np.stack(shape))


def part(seconds: Seconds, which: slice) -> Seconds:
    """Return some of the seconds."""
    return Seconds(
        seconds.second[which],
        seconds.num_steps[which],
        seconds.cpu_ns[which],
        seconds.off_ns[which],
        seconds.queued_ns[which],
        seconds.shape[which],
    )
