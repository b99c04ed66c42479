"""What a step takes on a healthy rank: fitted against batch shape, learnt from warm-up, kept fresh. Pure.

Time on the core and time off it are fitted apart. On a busy host most of a step's wall time may be spent in the run
queue: the kernel says how much, and it is taken out; of the rest the lower quartile is fitted, what even the least
disturbed steps need. Both fits are ridge regressions with coefficients that are not negative (more work never takes
less time), reweighted so that a heavy tail pulls little, and centred: the middle residual of what they learnt is 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.times import StepTimes

Float64 = NDArray[np.float64]

ON_CORE: Final = 0.5
"""Of CPU time the median is fitted, ..."""
OFF_CORE: Final = 0.25
"""... of the time off the core this quantile."""
RIDGE: Final = 1e-4
"""Penalty of a coefficient, relative to the number of steps, on columns scaled to a maximum of 1."""
ROUNDS: Final = 8
"""Reweighting rounds; the weights settle in about five."""
TRIM: Final = 2.0
"""Residuals beyond this many robust deviations lose weight in proportion."""
LOW: Final = 0.32
"""Where below the fitted quantile the deviation is taken: for the median, one standard deviation of a normal spread."""
MIN_SPREAD_NS: Final = 20_000.0
MIN_SPREAD: Final = 0.02
"""Steps are never taken to be more alike than this share: else rare shapes, which fit worst, would lose all weight."""
MIN_STEPS: Final = 16
"""Fewer steps than this fit nothing: six coefficients and a spread."""
SKIP_FIRST: Final = 4
"""First steps of a rank, in which code and memory are touched for the first time."""
MOST_STEPS: Final = 1500
"""Healthy steps kept of a rank; a new one takes a random old one's place, so that memory of shapes fades slowly."""

MEMORY: Final = 0.2
"""Weight of the newest stretch in the running mean of waits."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Expected time of a step by its shape."""

    coefficients: Float64
    """float64[1 + len(SHAPE)]: ns, and ns a unit of each shape column."""
    sigma_ns: float
    """Robust deviation of one step around the fit, taken from below, where a busy host does not reach."""
    covariance: Float64
    """Of the coefficients, for one unit of residual variance."""

    def ns(self, shape: Float64) -> Float64:
        """Return the expected time, float64[n], of steps of shape [n, len(SHAPE)]."""
        return _design(shape) @ self.coefficients

    def error_ns(self, shape: Float64) -> float:
        """Return how far off the fit itself may be at the mean of these shapes: large where it never learnt."""
        if not len(shape):
            return 0.0
        at = _design(shape).mean(axis=0)
        return float(self.sigma_ns * np.sqrt(max(0.0, at @ self.covariance @ at)))


def fit(shape: Float64, ns: Float64, quantile: float = ON_CORE) -> Fit | None:
    """Return the fit of a quantile of n steps' time, or None for fewer than `MIN_STEPS`."""
    if len(ns) < MIN_STEPS:
        return None
    scale = np.maximum(np.abs(shape).max(axis=0), 1e-9)
    design = _design(shape / scale)
    penalty = np.diag([0.0] + [RIDGE * len(ns)] * len(SHAPE))
    weights = np.ones(len(ns))
    solved = np.zeros(design.shape[1])
    sigma = floor = max(MIN_SPREAD_NS, MIN_SPREAD * float(np.median(ns)))
    for _ in range(ROUNDS):
        solved = _solve(design, ns, weights, penalty)
        residual = ns - design @ solved
        low, middle = np.quantile(residual, [LOW * quantile, quantile])
        sigma = max(floor, float(middle - low))
        side = np.where(residual > middle, quantile, 1 - quantile)
        weights = 2 * side * np.minimum(1.0, TRIM * sigma / np.maximum(np.abs(residual - middle), 1.0))
    solved[0] += np.quantile(ns - design @ solved, quantile)
    inverse = np.asarray(np.linalg.pinv((design * weights[:, None]).T @ design + penalty), np.float64)
    unscale = np.concatenate([[1.0], 1.0 / scale])
    return Fit(solved * unscale, sigma, inverse * np.outer(unscale, unscale))


def _design(shape: Float64) -> Float64:
    return np.concatenate([np.ones((len(shape), 1)), shape], axis=1)


def _solve(design: Float64, busy_ns: Float64, weights: Float64, penalty: Float64) -> Float64:
    """Return ridge coefficients, the shape's never negative: the most negative is left out until none is."""
    weighted = design * weights[:, None]
    left, right = weighted.T @ design + penalty, weighted.T @ busy_ns
    kept = list(range(design.shape[1]))
    while True:
        solved = np.asarray(np.linalg.lstsq(left[np.ix_(kept, kept)], right[kept], rcond=None)[0], np.float64)
        if len(kept) == 1 or solved[1:].min() >= 0:
            break
        del kept[1 + int(np.argmin(solved[1:]))]
    full = np.zeros(design.shape[1])
    full[kept] = solved
    return full


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + MEMORY * (new - old)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a rank's steps should take, and how sure that is."""

    on_core: Fit
    off_core: Fit

    def busy_ns(self, shape: Float64) -> Float64:
        """Return the expected wall time of undisturbed steps, float64[n]."""
        return self.on_core.ns(shape) + self.off_core.ns(shape)

    def error_ns(self, shape: Float64) -> float:
        """Return how far off both fits together may be at the mean of these shapes."""
        return float(np.hypot(self.on_core.error_ns(shape), self.off_core.error_ns(shape)))


@dataclass
class _Learnt:
    shape: Float64 = field(default_factory=lambda: np.zeros((0, len(SHAPE))))
    cpu_ns: Float64 = field(default_factory=lambda: np.zeros(0))
    off_ns: Float64 = field(default_factory=lambda: np.zeros(0))
    num_seen: int = 0
    wait_ns: float | None = None
    expectation: Expectation | None = None
    stale: bool = False


class Baseline:
    """Each rank's healthy steps and their fits. Only what was judged healthy may be learnt."""

    def __init__(self, seed: int = 0) -> None:
        self._ranks: defaultdict[int, _Learnt] = defaultdict(_Learnt)
        self._random = np.random.default_rng(seed)

    def learn(self, rank: int, times: StepTimes, *, run_delay_ns: float = 0.0, wait_ns: float | None = None) -> None:
        """Take in healthy steps of a rank; its very first are skipped.

        run_delay_ns: what they spent in the run queue, all together: it is taken out of their time off the core.
        wait_ns: what one of them waited for other ranks, on average.
        """
        learnt = self._ranks[rank]
        if wait_ns is not None:
            learnt.wait_ns = _blend(learnt.wait_ns, wait_ns)
        skipped = max(0, SKIP_FIRST - learnt.num_seen)
        learnt.num_seen += len(times)
        shape = np.concatenate([learnt.shape, times.shape[skipped:]])
        cpu = np.concatenate([learnt.cpu_ns, times.cpu_ns[skipped:]])
        blocked = max(0.0, 1.0 - run_delay_ns / max(1.0, float(times.off_ns.sum())))
        off = np.concatenate([learnt.off_ns, blocked * times.off_ns[skipped:]])
        if len(cpu) > MOST_STEPS:
            kept = np.sort(self._random.choice(len(cpu), MOST_STEPS, replace=False))
            shape, cpu, off = shape[kept], cpu[kept], off[kept]
        learnt.shape, learnt.cpu_ns, learnt.off_ns, learnt.stale = shape, cpu, off, True

    def expectation(self, rank: int) -> Expectation | None:
        """Return what the rank's steps should take, or None while too little was learnt."""
        learnt = self._ranks[rank]
        if learnt.stale:
            on, off = fit(learnt.shape, learnt.cpu_ns), fit(learnt.shape, learnt.off_ns, OFF_CORE)
            learnt.expectation = Expectation(on, off) if on and off else None
            learnt.stale = False
        return learnt.expectation

    def wait_ns(self, rank: int) -> float | None:
        """Return what a healthy step of the rank waits for other ranks, on average; None for nothing learnt."""
        return self._ranks[rank].wait_ns

    def num_steps(self, rank: int) -> int:
        """Return how many steps the rank's fits rest on."""
        return len(self._ranks[rank].cpu_ns)

    def typical_ns(self, rank: int) -> float:
        """Return the median expected busy time of what was learnt; 0 for nothing."""
        found = self.expectation(rank)
        return 0.0 if found is None else float(np.median(found.busy_ns(self._ranks[rank].shape)))
