"""The price in figures: what was measured, and the pure statistics over it.

Ratios are of pairs that ran in the same round, so that what drifts slowly falls out; their interval is a bootstrap of
the median. Nothing here reads a clock or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

WIDEST: Final = 0.02
"""A ratio whose 95 % interval is wider says nothing."""
MOST_FOREIGN: Final = 0.10
"""Largest share of all cores that other processes may take."""
MARGIN: Final = 0.01
"""A target holds when the worse end of the interval is within this of it."""
RESAMPLES: Final = 2000
FEWEST_PAIRS: Final = 5
OVERLAP_S: Final = 300e-6
"""A step counts as run beside the drain when other threads of its process used more CPU than this meanwhile: a look
that takes nothing uses less, a batch more."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios with its bootstrap 95 % interval."""

    name: str
    median: float
    low: float
    high: float
    num_pairs: int

    @property
    def is_noisy(self) -> bool:
        """Tell whether the interval is too wide, or rests on too few pairs, to say anything."""
        return self.num_pairs < FEWEST_PAIRS or self.high - self.low > WIDEST


@dataclass(frozen=True, slots=True)
class Cost:
    """What something takes, in ns: the median of rounds with its bootstrap 95 % interval."""

    name: str
    median_ns: float
    low_ns: float
    high_ns: float
    num_rounds: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU-seconds of one stretch, by who used them."""

    step_s: float = 0.0
    """The step thread."""
    drain_s: float = 0.0
    shipping_s: float = 0.0
    """Every other thread of the step's process: the exporter's and gRPC's."""
    collector_s: float = 0.0
    judge_s: float = 0.0

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def beside_s(self) -> float:
        """All but the step thread."""
        return self.drain_s + self.shipping_s + self.collector_s + self.judge_s

    @property
    def total_s(self) -> float:
        return self.step_s + self.beside_s


@dataclass(frozen=True, slots=True)
class Block:
    """One block of steps of one variant, flush included."""

    variant: str
    round: int
    num_rows: int
    """Token rows computed."""
    steps_s: float
    """Wall time of the steps."""
    flush_s: float
    """Wall time until everything asked for was durable; nothing else ran."""
    cpu: Cpu
    step_times_s: Floats = field(repr=False)
    beside_times_s: Floats = field(repr=False)
    """CPU of this process's other threads during each step."""

    @property
    def wall_s(self) -> float:
        return self.steps_s + self.flush_s


@dataclass(frozen=True, slots=True)
class Account:
    """Rows asked for and rows found by reading the store again, by table."""

    asked: dict[str, int]
    stored: dict[str, int]
    dropped: int

    @property
    def missing(self) -> dict[str, int]:
        """By table: rows asked for and not stored; negative where there are more than asked for."""
        return {name: n - self.stored.get(name, 0) for name, n in self.asked.items() if n != self.stored.get(name, 0)}

    @property
    def closes(self) -> bool:
        return not self.missing and not self.dropped


@dataclass(frozen=True, slots=True)
class DrainEffect:
    """What steps that ran beside the drain paid for it."""

    num_beside: int
    num_alone: int
    excess_ms: float
    """Mean step beside the drain, less what a step alone would be that is struck at a random moment."""
    share: float
    """That excess, all steps together, as a share of step time; with its bootstrap 95 % interval."""
    low: float
    high: float


def paired(name: str, base: Sequence[float] | Floats, other: Sequence[float] | Floats, seed: int = 0) -> Ratio:
    """Return the median of other[i] / base[i] with its interval. Raises ValueError where they do not pair up."""
    above, below = np.asarray(other, np.float64), np.asarray(base, np.float64)
    if above.shape != below.shape or not len(below):
        raise ValueError(f"{name}: {len(above)} values cannot be paired with {len(below)}")
    return Ratio(name, *_median(above / below, seed))


def cost(name: str, seconds: Sequence[float] | Floats, seed: int = 0) -> Cost:
    """Return the median of values, of which each is of a round, with its interval. Raises ValueError for none."""
    values = np.asarray(seconds, np.float64)
    if not len(values):
        raise ValueError(f"{name}: there are no values")
    return Cost(name, *_median(values * 1e9, seed))


def _median(values: Floats, seed: int) -> tuple[float, float, float, int]:
    """Return the median, both ends of its bootstrap 95 % interval, and how many values it rests on."""
    rng = np.random.default_rng(seed)
    medians = np.median(values[rng.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high), len(values)


def drain_effect(step_s: Floats, beside_s: Floats, seed: int = 0) -> DrainEffect | None:
    """Compare steps that ran beside the drain with those that did not; None unless there are two of each.

    A random moment strikes long steps more often than short ones, so the mean alone is weighted by length.
    """
    beside, alone = step_s[beside_s > OVERLAP_S], step_s[beside_s <= OVERLAP_S]
    if min(len(beside), len(alone)) < 2:
        return None
    rng = np.random.default_rng(seed)

    def excess(a: Floats, b: Floats) -> float:
        return float(a.mean() - (b * b).sum() / b.sum())

    weight = len(beside) / float(step_s.sum())
    drawn = [excess(rng.choice(beside, len(beside)), rng.choice(alone, len(alone))) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5]) * weight
    found = excess(beside, alone)
    return DrainEffect(len(beside), len(alone), found * 1e3, found * weight, float(low), float(high))


def by_round(blocks: Sequence[Block], variant: str) -> list[Block]:
    """Return the blocks of one variant in order of their rounds."""
    return sorted((block for block in blocks if block.variant == variant), key=lambda block: block.round)


def total_cpu(blocks: Sequence[Block]) -> Cpu:
    return sum((block.cpu for block in blocks), Cpu())


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio, or a share, is to stay below (or above)."""

    limit: float
    at_least: bool = False

    def verdict(self, ratio: Ratio) -> str:
        """Return "met", "missed" or "too noisy"."""
        if ratio.is_noisy:
            return "too noisy"
        worse_by = self.limit - ratio.low if self.at_least else ratio.high - self.limit
        return "met" if worse_by <= MARGIN else "missed"


def noise(ratios: Sequence[Ratio], foreign_share: float) -> list[str]:
    """Return why nothing may be concluded, one line each; empty when something may."""
    found = [
        f"{ratio.name}: interval [{ratio.low:.4f}, {ratio.high:.4f}] of {ratio.num_pairs} pairs"
        for ratio in ratios
        if ratio.is_noisy
    ]
    if foreign_share > MOST_FOREIGN:
        found.append(f"other processes took {foreign_share:.0%} of the cores (most: {MOST_FOREIGN:.0%})")
    return found


@dataclass(frozen=True)
class Result:
    """Everything measured on one model."""

    model: str
    num_params: int
    batch: int
    num_sites: int
    step_ms: float
    """Median detached step."""
    ratios: dict[str, list[Ratio]]
    """Heading -> ratios."""
    shares: dict[str, dict[str, float]]
    """Variant -> who -> CPU-seconds a rank-second."""
    rows_per_cpu_s: dict[str, float]
    flush_ms: dict[str, float]
    """Variant -> median wait for durability at the end of a block."""
    drain: DrainEffect | None
    account: Account
    foreign_share: float
    noise: list[str]
    targets: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
