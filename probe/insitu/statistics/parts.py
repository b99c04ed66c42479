"""What the values at a site were like, in numbers that add up across steps, ranks and hosts. Pure: numpy alone.

A mergeable triple. `reductions.compute` makes a part inside the forward pass and `from_places` reads it;
`combine` adds parts up, in any order and grouping; `finalise` makes of them what a person reads. Of values that are not
finite only the number and the first place are kept, so that one NaN leaves the rest readable.

Moments are combined by the formulas of Chan, Golub and LeVeque (1979) and Pebay, "Formulas for Robust, One-Pass
Parallel Computation of Covariances and Arbitrary-Order Statistical Moments" (2008), about the common mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from insitu.statistics import layout

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NONE: Final = np.iinfo(np.int64).max
"""Step or row of what did not happen: comes after all that did."""
_ROUNDING: Final = 8 * float(np.finfo(np.float64).eps)
"""A deviation of so much of the mean is the rounding of that mean: such values do not vary."""


class Count(IntEnum):
    """Columns of `Partials.counts`. All of them add up."""

    PARTS = 0
    """Steps, once for each rank that told of one."""
    ROWS = 1
    VALUES = 2
    NAN = 3
    INF = 4
    ZERO = 5
    NEAR_ZERO = 6
    """At most `NEAR_ZERO_RMS` of the part's root mean square; zeros too."""
    OUTLIER = 7
    """Larger than `OUTLIER_RMS` times the part's root mean square."""
    BEYOND = 8
    """Larger than `BEYOND`."""
    E4M3_OVER = 9
    E4M3_UNDER = 10
    E5M2_OVER = 11
    E5M2_UNDER = 12
    """Not zero, and a cast to float8 would make it zero."""


@dataclass(frozen=True, slots=True)
class Partials:
    """n parts, as arrays over them."""

    counts: Ints
    """[n, len(Count)]."""
    octaves: Ints
    """[n, 32]: finite values that are not zero, by magnitude."""
    moments: Floats
    """[n, 4]: mean of the finite values, sums of the powers 2, 3 and 4 of their deviations from it."""
    absmax: Floats
    absmax_at: Ints
    """[n, 2]: the step and the row of the largest magnitude; of equal ones the first."""
    smallest: Floats
    """The smallest magnitude that is not zero; inf where there is none."""
    first_bad: Ints
    """[n, 2]: the first step, and its first row, with a value that is not finite; NONE without one."""
    channels: Ints
    """[n, 8]: the channels with the largest magnitudes, that first; -1 where there are fewer."""
    channel_absmax: Floats
    figure_num: Ints
    """[n, 8]: rows in which the figure was finite."""
    figures: Floats
    """[n, 8, 4]: mean, sum of squared deviations, least, greatest."""
    cast_num: Ints
    """[n, 3, 2]: by format values that were cast, and those of them that became zero and were not."""
    casts: Floats
    """[n, 3, 2]: sum of squared errors, sum of squares of what was cast."""
    checksum: Ints
    """Of the bits of all values; of parts that differ, or where there is none, NO_CHECKSUM."""

    def __len__(self) -> int:
        return len(self.absmax)

    def take(self, index: Any) -> Partials:
        """Return some of the parts, by a numpy index."""
        return Partials(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def num_finite(self) -> Ints:
        return self.counts[:, Count.VALUES] - self.counts[:, Count.NAN] - self.counts[:, Count.INF]


def concat(parts: list[Partials]) -> Partials:
    """Return the parts of all, in order. There is at least one."""
    return Partials(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Partials)))


_RUNG: Final = np.arange(layout.LOWEST, layout.HIGHEST + 1, dtype=np.int32)
_LOWER_EDGE: Final = np.where(_RUNG == layout.LOWEST, -1.0, (_RUNG << layout.MANTISSA_BITS).view(np.float32))
"""A rung holds what is larger than this; the lowest holds zeros too."""
_OCTAVE: Final = np.clip((_RUNG >> 2) - 127 - layout.FIRST_OCTAVE, 0, layout.NUM_OCTAVES - 1)


def from_places(step_id: Ints, ints: Ints, floats: Floats) -> Partials:
    """Return what `reductions.compute` left: int64[n, NUM_INTS] and float64[n, NUM_FLOATS], a part a row."""
    bad, nothing = ints[:, layout.BAD], ints[:, layout.ZERO]
    rungs = ints[:, layout.RUNG]
    octaves = np.stack([rungs[:, octave == _OCTAVE].sum(1) for octave in range(layout.NUM_OCTAVES)], 1)
    octaves[:, 0] -= nothing  # what is not finite was counted as zero

    def over(threshold: float) -> Any:
        return rungs[:, threshold <= _LOWER_EDGE].sum(1)

    def under(threshold: float) -> Any:
        return rungs[:, threshold > _LOWER_EDGE].sum(1) - nothing

    counts = np.empty((len(ints), len(Count)), np.int64)
    counts[:, Count.PARTS] = 1
    counts[:, Count.ROWS] = ints[:, layout.ROWS]
    counts[:, Count.VALUES] = rungs.sum(1)
    counts[:, Count.NAN] = ints[:, layout.NAN]
    counts[:, Count.INF] = bad - ints[:, layout.NAN]
    counts[:, Count.ZERO] = nothing - bad
    counts[:, Count.NEAR_ZERO] = ints[:, layout.NEAR_ZERO] - bad
    counts[:, Count.OUTLIER] = ints[:, layout.OUTLIER]
    counts[:, Count.BEYOND] = over(layout.BEYOND)
    for column, (smallest, largest) in ((Count.E4M3_OVER, layout.E4M3), (Count.E5M2_OVER, layout.E5M2)):
        counts[:, column], counts[:, column + 1] = over(largest), under(smallest)
    is_finite = counts[:, Count.VALUES] > bad
    return Partials(
        counts,
        octaves,
        floats[:, layout.MOMENTS],
        floats[:, layout.CHANNEL_ABSMAX][:, 0],
        _at(step_id, ints[:, layout.ABSMAX_ROW], is_finite),
        np.where(octaves.any(1), floats[:, layout.SMALLEST], np.inf),
        _at(step_id, ints[:, layout.FIRST_BAD], bad > 0),
        np.where(is_finite[:, None], ints[:, layout.CHANNEL], layout.NO_CHANNEL),
        floats[:, layout.CHANNEL_ABSMAX],
        ints[:, layout.FIGURE_NUM],
        floats[:, layout.FIGURE].reshape(len(ints), len(layout.FIGURES), 4),
        np.stack([ints[:, layout.CAST_NUM], ints[:, layout.CAST_LOST]], 2),
        floats[:, layout.CAST].reshape(len(ints), len(layout.CASTS), 2),
        ints[:, layout.CHECKSUM],
    )


def _at(step_id: Ints, row: Ints, is_known: NDArray[np.bool_]) -> Ints:
    return np.where(is_known[:, None], np.stack([step_id, row], 1), NONE)


def combine(parts: Partials, group: Ints) -> Partials:
    """Return the parts of each group added up, in order of the groups' numbers; a group nobody is in has no part."""
    order = np.argsort(group, kind="stable")
    parts, group = parts.take(order), group[order]
    starts = np.flatnonzero(np.diff(group, prepend=group[:1] - 1))
    if not len(starts):
        return parts
    largest = _first(group, -parts.absmax, parts.absmax_at)
    channels, sizes = _combine_channels(parts, group, starts)
    num, figures = _combine_figures(parts, starts)
    return Partials(
        np.add.reduceat(parts.counts, starts),
        np.add.reduceat(parts.octaves, starts),
        _combine_moments(parts, starts),
        parts.absmax[largest],
        parts.absmax_at[largest],
        np.minimum.reduceat(parts.smallest, starts),
        parts.first_bad[_first(group, np.zeros(len(group)), parts.first_bad)],
        channels,
        sizes,
        num,
        figures,
        np.add.reduceat(parts.cast_num, starts),
        np.add.reduceat(parts.casts, starts),
        _one_for_all(parts.checksum, starts),
    )


def _one_for_all(checksum: Ints, starts: Ints) -> Ints:
    low, high = np.minimum.reduceat(checksum, starts), np.maximum.reduceat(checksum, starts)
    return np.where(low == high, low, layout.NO_CHECKSUM)


def _first(group: Ints, size: Floats, at: Ints) -> Ints:
    """Return the place of each group's part with the smallest `size`; of equal ones the first by step and row."""
    order = np.lexsort((at[:, 1], at[:, 0], size, group))
    found: Ints = order[np.flatnonzero(np.diff(group[order], prepend=group[:1] - 1))]
    return found


def _spread(values: Any, starts: Ints, num: int) -> Any:
    """Return each group's value once for each of its parts."""
    return np.repeat(values, np.diff(starts, append=num), axis=0)


def _combine_moments(parts: Partials, starts: Ints) -> Floats:
    num = parts.num_finite.astype(np.float64)
    mean, m2, m3, m4 = parts.moments.T
    together = np.add.reduceat(num * mean, starts) / np.maximum(np.add.reduceat(num, starts), 1.0)
    d = np.where(num > 0, mean - _spread(together, starts, len(parts)), 0.0)
    m4 = m4 + 4 * d * m3 + 6 * d**2 * m2 + num * d**4
    m3 = m3 + 3 * d * m2 + num * d**3
    m2 = m2 + num * d**2
    return np.stack([together, *(np.add.reduceat(each, starts) for each in (m2, m3, m4))], 1)


def _combine_figures(parts: Partials, starts: Ints) -> tuple[Ints, Floats]:
    num = parts.figure_num
    mean, squares, low, high = np.moveaxis(np.where(num[..., None] > 0, parts.figures, 0.0), 2, 0)
    total = np.add.reduceat(num, starts)
    together = np.add.reduceat(num * mean, starts) / np.maximum(total, 1)
    d = mean - _spread(together, starts, len(parts))
    squares = np.add.reduceat(squares + num * d**2, starts)
    low = np.minimum.reduceat(np.where(num > 0, low, np.inf), starts)
    high = np.maximum.reduceat(np.where(num > 0, high, -np.inf), starts)
    return total, np.stack([together, squares, low, high], 2)


def _combine_channels(parts: Partials, group: Ints, starts: Ints) -> tuple[Ints, Floats]:
    """Keep the channels with the largest magnitudes. Exact: a channel among a group's is among its own part's."""
    owner = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(group)) * layout.NUM_CHANNELS)
    channel, size = parts.channels.reshape(-1), parts.channel_absmax.reshape(-1)
    known = channel != layout.NO_CHANNEL
    owner, channel, size = owner[known], channel[known], size[known]
    order = np.lexsort((-size, channel, owner))
    owner, channel, size = owner[order], channel[order], size[order]
    kept = np.diff(owner, prepend=-1).astype(bool) | np.diff(channel, prepend=-1).astype(bool)
    owner, channel, size = owner[kept], channel[kept], size[kept]
    order = np.lexsort((channel, -size, owner))
    owner, channel, size = owner[order], channel[order], size[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    kept = rank < layout.NUM_CHANNELS
    channels = np.full((len(starts), layout.NUM_CHANNELS), layout.NO_CHANNEL)
    sizes = np.zeros(channels.shape)
    channels[owner[kept], rank[kept]] = channel[kept]
    sizes[owner[kept], rank[kept]] = size[kept]
    return channels, sizes


_SHARES: Final = ("zero", "near_zero", "outlier", "beyond", "e4m3_over", "e4m3_under", "e5m2_over", "e5m2_under")


_LOGSUMEXP: Final = layout.FIGURES.index("logsumexp")


def finalise(parts: Partials) -> Mapping[str, NDArray[Any]]:
    """Return what a person reads, by name, an array over the parts each (docs/probe.md); NaN is what nobody can tell.

    Places (`absmax_step`, `first_bad_row`, ...) are -1 where there is none.
    """
    count = {name.name.lower(): parts.counts[:, name] for name in Count}
    num = parts.num_finite.astype(np.float64)
    mean, m2, m3, m4 = parts.moments.T
    with np.errstate(all="ignore"):
        variance = np.where(m2 <= num * (_ROUNDING * mean) ** 2, 0.0, m2) / num
        rms = np.sqrt(variance + mean**2)
        shares = {f"{name}_share": count[name] / num for name in _SHARES}
        found = {
            **{f"num_{name}": count[name] for name in ("parts", "rows", "values", "nan", "inf")},
            **dict(zip(("first_bad_step", "first_bad_row"), _places(parts.first_bad), strict=True)),
            "absmax": np.where(num > 0, parts.absmax, np.nan),
            **dict(zip(("absmax_step", "absmax_row"), _places(parts.absmax_at), strict=True)),
            "absmax_channel": np.where(num > 0, parts.channels[:, 0], layout.NO_CHANNEL),
            "sum": np.where(num > 0, mean * num, 0.0),
            "mean": np.where(num > 0, mean, np.nan),
            "rms": rms,
            "std": np.sqrt(variance),
            "skew": np.where(variance > 0, m3 / num / variance**1.5, np.nan),
            "kurtosis": np.where(variance > 0, m4 / num / variance**2, np.nan),
            **shares,
            "outlier_channels": _outlier_channels(parts, layout.OUTLIER_RMS * rms),
            "beyond_channels": _outlier_channels(parts, np.full(len(parts), layout.BEYOND)),
            "dynamic_range": np.where(np.isfinite(parts.smallest), np.log2(parts.absmax / parts.smallest), np.nan),
            "octaves": parts.octaves,
        }
        return found | _figures(parts) | _casts(parts)


def _places(at: Ints) -> tuple[Ints, Ints]:
    step, row = np.where(at == NONE, -1, at).T
    return step, row


def _outlier_channels(parts: Partials, threshold: Floats) -> Ints:
    """Return [n, 8]: of the named channels those with a magnitude beyond the threshold, the largest first; else -1."""
    is_outlier = (parts.channels != layout.NO_CHANNEL) & (parts.channel_absmax > threshold[:, None])
    return np.where(is_outlier, parts.channels, layout.NO_CHANNEL)


def _casts(parts: Partials) -> dict[str, NDArray[Any]]:
    """Return by format mean squared error, the same as a share of the mean square, and what it makes zero."""
    found: dict[str, NDArray[Any]] = {}
    for place, name in enumerate(layout.CASTS):
        (num, lost), (noise, signal) = parts.cast_num[:, place].T, parts.casts[:, place].T
        found |= {f"{name}_mse": noise / num, f"{name}_noise": noise / signal, f"{name}_lost_share": lost / num}
    return found


def _figures(parts: Partials) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for place, name in enumerate(layout.FIGURES):
        num, (mean, squares, low, high) = parts.figure_num[:, place], parts.figures[:, place].T
        told = {
            "": mean,
            "_std": np.sqrt(squares / num),
            "_min": low,
            "_max": high,
        }
        found |= {f"{name}{suffix}": np.where(num > 0, values, np.nan) for suffix, values in told.items()}
    del found["top_id"], found["top_id_std"]  # ids are names: only whether they are one and the same means anything
    num, (mean, squares, _, _) = parts.figure_num[:, _LOGSUMEXP], parts.figures[:, _LOGSUMEXP].T
    return found | {"z_loss": np.where(num > 0, mean**2 + squares / num, np.nan)}
