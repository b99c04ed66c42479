"""Two stretches of recorded time against each other: step times, latencies, values at sites, verdicts. Pure.

Step times are compared at equal batch shape: what side A's steps took is fitted against their shape
(`insitu_collector.steps.baseline`), and each step of both sides is divided by what the fit expects of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.steps.baseline import fit
from insitu_collector.steps.times import StepTimes
from insitu_collector.values.summaries import Shift, SiteStatistics, shift

Float64 = NDArray[np.float64]

BLOCK_NS: Final = 1_000_000_000
"""Neighbouring steps are alike, so whole seconds are drawn for an interval, not single steps."""
MIN_BLOCKS: Final = 5
MIN_SAMPLES: Final = 20
"""Fewer seconds of steps, or requests, give no interval, and nothing is said of them."""
DRAWS: Final = 1_000
CONFIDENCE: Final = 0.95
MIN_SHIFT: Final = 0.5
"""Pooled deviations that the mean of a site's figure must move by to be told: half of what single steps vary by, ..."""
MIN_ERRORS: Final = 5.0
"""... and standard errors, since thousands of steps make any difference certain and neighbours are not independent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one side is compared by."""

    label: str
    stages: Mapping[int, int]
    """Rank -> stage."""
    times: Mapping[int, StepTimes]
    """Rank -> its steps of traffic."""
    tokens_per_s: float | None = None
    ttft_s: Float64 = field(default_factory=lambda: np.zeros(0))
    itl_s: Float64 = field(default_factory=lambda: np.zeros(0))
    sites: Mapping[str, SiteStatistics] = field(default_factory=dict)
    alarms: frozenset[tuple[str, int | None, int | None]] = frozenset()
    """(kind, stage, rank) of what stood at the end; `healthy` and `inconclusive` are no alarms."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """B over A, with a bootstrap interval of `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChange:
    """What a rank's steps take, at equal batch shape."""

    rank_a: int
    rank_b: int
    stage: int
    a_ms: float
    b_ms: float
    """Medians as recorded, whatever the shapes were."""
    ratio: Ratio | None
    """At equal shape; None where too little was recorded."""
    core_ratio: Ratio | None
    """The same of the time on the core alone, which a busy host hardly touches."""
    off_share_a: float
    off_share_b: float
    """Share of the time in which the step thread was on no core."""


@dataclass(frozen=True, slots=True)
class FigureChange:
    """One figure of the whole, in seconds or a second."""

    name: str
    a: float | None
    b: float | None
    ratio: Ratio | None


@dataclass(frozen=True, slots=True)
class SiteChange:
    """One site whose values are not what they were."""

    site: str
    figure: str
    """`row_sum`, `absmax` or `nonfinite`."""
    a: float
    b: float
    shift: Shift


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """B against A."""

    a: str
    b: str
    steps: tuple[StepChange, ...]
    figures: tuple[FigureChange, ...]
    sites: tuple[SiteChange, ...]
    """Only those that moved."""
    num_sites: int
    """Sites that both sides have figures of."""
    gained: tuple[tuple[str, int | None, int | None], ...]
    lost: tuple[tuple[str, int | None, int | None], ...]
    doubts: tuple[str, ...]
    """What could not be compared, and why."""


def compare(a: Measured, b: Measured, pairs: Mapping[int, int] | None = None, seed: int = 0) -> Comparison:
    """Return how B differs from A. pairs: rank of A -> rank of B; without it, ranks of one number and stage."""
    random = np.random.default_rng(seed)
    doubts = []
    if pairs is None:
        pairs = {rank: rank for rank, stage in a.stages.items() if b.stages.get(rank) == stage}
        if dict(a.stages) != dict(b.stages):
            doubts.append(f"the grids differ: {_grid(a)} in A, {_grid(b)} in B; only ranks of both are compared")
    steps = [_step_change(a, b, rank_a, rank_b, random) for rank_a, rank_b in pairs.items()]
    doubts += [
        f"rank {change.rank_b} has too few steps on one side for a ratio" for change in steps if change.ratio is None
    ]
    common = sorted(a.sites.keys() & b.sites.keys())
    return Comparison(
        a=a.label,
        b=b.label,
        steps=tuple(sorted(steps, key=lambda change: (change.stage, change.rank_a))),
        figures=_figures(a, b, random),
        sites=tuple(change for name in common for change in _site_changes(name, a.sites[name], b.sites[name])),
        num_sites=len(common),
        gained=_sorted(b.alarms - a.alarms),
        lost=_sorted(a.alarms - b.alarms),
        doubts=tuple(doubts),
    )


def _grid(side: Measured) -> str:
    return f"{len(set(side.stages.values()))} stages, {len(side.stages)} ranks"


def _sorted(alarms: frozenset[tuple[str, int | None, int | None]]) -> tuple[tuple[str, int | None, int | None], ...]:
    return tuple(sorted(alarms, key=lambda alarm: (alarm[0], alarm[1] or -1, alarm[2] or -1)))


# -- step times -------------------------------------------------------------------------------------------------------


def _step_change(a: Measured, b: Measured, rank_a: int, rank_b: int, random: np.random.Generator) -> StepChange:
    before, after = a.times.get(rank_a), b.times.get(rank_b)
    return StepChange(
        rank_a=rank_a,
        rank_b=rank_b,
        stage=a.stages[rank_a],
        a_ms=_median_ms(before),
        b_ms=_median_ms(after),
        ratio=_shape_ratio(before, after, "busy_ns", random),
        core_ratio=_shape_ratio(before, after, "cpu_ns", random),
        off_share_a=_off_share(before),
        off_share_b=_off_share(after),
    )


def _median_ms(times: StepTimes | None) -> float:
    return float(np.median(times.busy_ns)) / 1e6 if times is not None and len(times) else 0.0


def _off_share(times: StepTimes | None) -> float:
    return float(times.off_ns.sum() / times.busy_ns.sum()) if times is not None and len(times) else 0.0


def _shape_ratio(
    before: StepTimes | None, after: StepTimes | None, kind: str, random: np.random.Generator
) -> Ratio | None:
    """Return B over A of `busy_ns` or `cpu_ns` at equal shape."""
    if before is None or after is None:
        return None
    expected = fit(before.shape, getattr(before, kind))
    if expected is None:
        return None
    blocks = [
        _block_medians(times, getattr(times, kind) / np.maximum(expected.ns(times.shape), 1.0))
        for times in (before, after)
    ]
    return _bootstrapped(blocks[0], blocks[1], MIN_BLOCKS, random)


def _block_medians(times: StepTimes, relative: Float64) -> Float64:
    """Return the median of each second's steps, by begin."""
    number = times.t_ns // BLOCK_NS
    edges = np.flatnonzero(np.diff(number)) + 1
    return np.array([np.median(part) for part in np.split(relative, edges)]) if len(relative) else np.zeros(0)


def _bootstrapped(
    before: Float64, after: Float64, least: int, random: np.random.Generator, percent: float = 50.0
) -> Ratio | None:
    """Return the ratio of a percentile of two samples, or None where one is smaller than `least`, or A's is 0."""
    if min(len(before), len(after)) < least:
        return None
    a, b = np.percentile(before, percent), np.percentile(after, percent)
    if a <= 0:
        return None
    drawn = [_redrawn(side, percent / 100, random) for side in (before, after)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn[1] / np.maximum(drawn[0], 1e-12), [tail, 100 - tail])
    return Ratio(float(b / a), float(low), float(high))


def _redrawn(sample: Float64, at: float, random: np.random.Generator) -> Float64:
    """Return a quantile of `DRAWS` bootstrap samples, float64[DRAWS], without drawing them.

    Where the k-th of n values drawn with replacement falls in the sorted sample is the k-th order statistic of n
    uniform numbers, which is Beta(k, n - k + 1) distributed (David and Nagaraja, "Order Statistics", 2.1).
    """
    place = at * (len(sample) - 1) + 1
    return np.quantile(sample, random.beta(place, len(sample) - place + 1, DRAWS))


# -- the whole --------------------------------------------------------------------------------------------------------


def _figures(a: Measured, b: Measured, random: np.random.Generator) -> tuple[FigureChange, ...]:
    found = [
        FigureChange(name, _percentile(before, percent), _percentile(after, percent), ratio)
        for name, before, after, percent in (
            ("ttft_p50_s", a.ttft_s, b.ttft_s, 50.0),
            ("ttft_p95_s", a.ttft_s, b.ttft_s, 95.0),
            ("itl_p50_s", a.itl_s, b.itl_s, 50.0),
            ("itl_p99_s", a.itl_s, b.itl_s, 99.0),
        )
        for ratio in (_bootstrapped(before, after, MIN_SAMPLES, random, percent),)
    ]
    return (FigureChange("tokens_per_s", a.tokens_per_s, b.tokens_per_s, None), *found)


def _percentile(samples: Float64, percent: float) -> float | None:
    return float(np.percentile(samples, percent)) if len(samples) else None


def _site_changes(name: str, before: SiteStatistics, after: SiteStatistics) -> list[SiteChange]:
    found = []
    for figure in ("row_sum", "absmax"):
        old, new = getattr(before, figure), getattr(after, figure)
        moved = shift(old, new)
        if moved is not None and abs(moved.size) >= MIN_SHIFT and abs(moved.errors) >= MIN_ERRORS:
            found.append(SiteChange(name, figure, old.mean, new.mean, moved))
    if bool(before.num_nonfinite) != bool(after.num_nonfinite):
        counts = float(before.num_nonfinite), float(after.num_nonfinite)
        direction = float(np.sign(counts[1] - counts[0])) * np.inf
        found.append(SiteChange(name, "nonfinite", *counts, Shift(direction, direction)))
    return found
