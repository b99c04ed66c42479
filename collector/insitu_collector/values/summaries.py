"""What the values at a site were like over many steps, in numbers that add up across steps, ranks and hosts. Pure.

Mean and spread are kept as (count, mean, sum of squared deviations) and merged by the pairwise formula of Chan, Golub
and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import numbers

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of some numbers."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Float64) -> Moments:
        """Return the moments of float64[n]; values that are not finite are left out."""
        kept = values[np.isfinite(values)]
        if not len(kept):
            return cls()
        mean = float(kept.mean())
        return cls(len(kept), mean, float(np.square(kept - mean).sum()))

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both together."""
        num = self.num + other.num
        if not num:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.num / num
        return Moments(num, mean, self.squares + other.squares + apart * apart * self.num * other.num / num)

    @property
    def variance(self) -> float:
        """Return the sample variance; 0 for fewer than two numbers."""
        return self.squares / (self.num - 1) if self.num > 1 else 0.0


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """One site over some steps; a step counts once, however many rows it had."""

    row_sum: Moments = Moments()
    """Of the mean over a step's rows of the sum of a row."""
    absmax: Moments = Moments()
    """Of log2 of a step's largest magnitude."""
    num_steps: int = 0
    num_nonfinite: int = 0
    """Steps in which some value was not finite; their other numbers are left out."""

    def merged(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics of both together."""
        return SiteStatistics(
            self.row_sum.merged(other.row_sum),
            self.absmax.merged(other.absmax),
            self.num_steps + other.num_steps,
            self.num_nonfinite + other.num_nonfinite,
        )


def site_statistics(summaries: pa.Table, sites: pa.Table) -> dict[str, SiteStatistics]:
    """Return the statistics of each named site; ranks that hold a site of one name add up."""
    named = {(row["rank"], row["site"]): row["name"] for row in sites.select(["rank", "site", "name"]).to_pylist()}
    rank, site = numbers(summaries, "rank", -1), numbers(summaries, "site", -1)
    rows = np.maximum(numbers(summaries, "num_rows", 1), 1)
    row_mean = _floats(summaries, "row_sum") / rows
    with np.errstate(divide="ignore"):
        absmax = np.log2(_floats(summaries, "absmax"))
    num_bad = np.asarray(pc.list_value_length(summaries["nonfinite_rows"]).fill_null(0))
    bad = (num_bad > 0) | ~np.isfinite(_floats(summaries, "canary", missing=0.0))
    found: dict[str, list[SiteStatistics]] = {}
    for of_rank, of_site in np.unique(np.stack([rank, site]), axis=1).T.tolist():
        mine = (rank == of_rank) & (site == of_site)
        good = mine & ~bad
        each = SiteStatistics(
            Moments.of(row_mean[good]), Moments.of(absmax[good]), int(mine.sum()), int((mine & bad).sum())
        )
        if (of_rank, of_site) in named:
            found.setdefault(named[of_rank, of_site], []).append(each)
    return {name: reduce(SiteStatistics.merged, each) for name, each in found.items()}


def _floats(rows: pa.Table, column: str, missing: float = math.nan) -> Float64:
    return np.asarray(rows[column].fill_null(missing)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far apart two distributions of one figure are."""

    size: float
    """Difference of the means in pooled deviations (Cohen's d); inf where neither varies and they differ."""
    errors: float
    """The same difference in standard errors (Welch)."""


def shift(before: Moments, after: Moments) -> Shift | None:
    """Return how far `after` lies from `before`, or None where one of them has fewer than two numbers."""
    if before.num < 2 or after.num < 2:
        return None
    apart = after.mean - before.mean
    pooled = math.sqrt((before.squares + after.squares) / (before.num + after.num - 2))
    error = math.sqrt(before.variance / before.num + after.variance / after.num)
    return Shift(_over(apart, pooled), _over(apart, error))


def _over(amount: float, unit: float) -> float:
    if amount == 0.0:
        return 0.0
    return amount / unit if unit > 0.0 else math.copysign(math.inf, amount)
