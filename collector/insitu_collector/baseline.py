"""What a step takes on a healthy rank: busy time fitted against batch shape, learnt from warm-up, kept fresh. Pure.

The fit is a ridge regression with coefficients that are not negative (more work never takes less time), reweighted so
that the heavy tail of a busy host pulls little. Then it is centred: the median residual of what it learnt from is 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.row_maps import SHAPE
from insitu_collector.step_times import StepTimes

Float64 = NDArray[np.float64]

RIDGE: Final = 1e-4
"""Penalty of a coefficient, relative to the number of steps, on columns scaled to a maximum of 1."""
ROUNDS: Final = 8
"""Reweighting rounds; the weights settle in about five."""
TRIM: Final = 2.0
"""Residuals beyond this many robust deviations lose weight in proportion."""
MIN_SPREAD: Final = 0.02
"""Steps are never taken to be more alike than this share: else rare shapes, which fit worst, would lose all weight."""
MIN_STEPS: Final = 16
"""Fewer steps than this fit nothing: six coefficients and a spread."""
SKIP_FIRST: Final = 4
"""First steps of a rank, in which code and memory are touched for the first time."""
MOST_STEPS: Final = 1500
"""Healthy steps kept of a rank; a new one takes a random old one's place, so that memory of shapes fades slowly."""

MEMORY: Final = 0.2
"""Weight of the newest stretch in the running means."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Expected busy time of a step by its shape."""

    coefficients: Float64
    """float64[1 + len(SHAPE)]: ns, and ns a unit of each shape column."""
    sigma_ns: float
    """Robust deviation of one step's busy time around the fit."""
    covariance: Float64
    """Of the coefficients, for one unit of residual variance."""

    def busy_ns(self, shape: Float64) -> Float64:
        """Return the expected busy time, float64[n], of steps of shape [n, len(SHAPE)]."""
        return _design(shape) @ self.coefficients

    def error_ns(self, shape: Float64) -> float:
        """Return how far off the fit itself may be at the mean of these shapes: large where it never learnt."""
        if not len(shape):
            return 0.0
        at = _design(shape).mean(axis=0)
        return float(self.sigma_ns * np.sqrt(max(0.0, at @ self.covariance @ at)))


def fit(shape: Float64, busy_ns: Float64) -> Fit | None:
    """Return the fit of n steps' busy time, or None for fewer than `MIN_STEPS`."""
    if len(busy_ns) < MIN_STEPS:
        return None
    scale = np.maximum(np.abs(shape).max(axis=0), 1e-9)
    design = _design(shape / scale)
    penalty = np.diag([0.0] + [RIDGE * len(busy_ns)] * len(SHAPE))
    weights = np.ones(len(busy_ns))
    solved = np.zeros(design.shape[1])
    sigma = floor = max(1.0, MIN_SPREAD * float(np.median(busy_ns)))
    for _ in range(ROUNDS):
        solved = _solve(design, busy_ns, weights, penalty)
        residual = busy_ns - design @ solved
        middle = float(np.median(residual))
        sigma = max(floor, 1.4826 * float(np.median(np.abs(residual - middle))))
        weights = np.minimum(1.0, TRIM * sigma / np.maximum(np.abs(residual - middle), 1.0))
    solved[0] += np.median(busy_ns - design @ solved)
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


@dataclass
class _Learnt:
    shape: Float64 = field(default_factory=lambda: np.zeros((0, len(SHAPE))))
    busy_ns: Float64 = field(default_factory=lambda: np.zeros(0))
    off_cpu_ns: Float64 = field(default_factory=lambda: np.zeros(0))
    num_seen: int = 0
    run_delay_ns: float | None = None
    wait_ns: float | None = None
    fit: Fit | None = None
    stale: bool = False


class Baseline:
    """Each rank's healthy steps and their fit. Only what was judged healthy may be learnt."""

    def __init__(self, seed: int = 0) -> None:
        self._ranks: defaultdict[int, _Learnt] = defaultdict(_Learnt)
        self._random = np.random.default_rng(seed)

    def learn(self, rank: int, times: StepTimes, *, run_delay_ns: float = 0.0, wait_ns: float = 0.0) -> None:
        """Take in healthy steps of a rank; its very first are skipped.

        run_delay_ns, wait_ns: what a step of these waited, on average, for a core and for other ranks.
        """
        learnt = self._ranks[rank]
        learnt.run_delay_ns = _blend(learnt.run_delay_ns, run_delay_ns)
        learnt.wait_ns = _blend(learnt.wait_ns, wait_ns)
        skipped = max(0, SKIP_FIRST - learnt.num_seen)
        learnt.num_seen += len(times)
        rows = np.concatenate([learnt.shape, times.shape[skipped:]])
        busy = np.concatenate([learnt.busy_ns, times.busy_ns[skipped:]])
        off = np.concatenate([learnt.off_cpu_ns, np.maximum(times.busy_ns - times.cpu_ns, 0.0)[skipped:]])
        if len(busy) > MOST_STEPS:
            kept = np.sort(self._random.choice(len(busy), MOST_STEPS, replace=False))
            rows, busy, off = rows[kept], busy[kept], off[kept]
        learnt.shape, learnt.busy_ns, learnt.off_cpu_ns, learnt.stale = rows, busy, off, True

    def fit(self, rank: int) -> Fit | None:
        """Return the rank's fit, or None while too little was learnt."""
        learnt = self._ranks[rank]
        if learnt.stale:
            learnt.fit, learnt.stale = fit(learnt.shape, learnt.busy_ns), False
        return learnt.fit

    def off_cpu_ns(self, rank: int) -> float:
        """Return the median time a healthy step of the rank spends off its core."""
        off = self._ranks[rank].off_cpu_ns
        return float(np.median(off)) if len(off) else 0.0

    def run_delay_ns(self, rank: int) -> float:
        """Return what a healthy step of the rank waits for a core, on average."""
        return self._ranks[rank].run_delay_ns or 0.0

    def wait_ns(self, rank: int) -> float | None:
        """Return what a healthy step of the rank waits for other ranks, on average; None for nothing learnt."""
        return self._ranks[rank].wait_ns

    def num_steps(self, rank: int) -> int:
        """Return how many steps the rank's fit rests on."""
        return len(self._ranks[rank].busy_ns)

    def typical(self, rank: int) -> tuple[float, float]:
        """Return the median busy time and the median number of rows of what was learnt, 0 for nothing."""
        learnt = self._ranks[rank]
        if not len(learnt.busy_ns):
            return 0.0, 0.0
        return float(np.median(learnt.busy_ns)), float(np.median(learnt.shape[:, 0]))
