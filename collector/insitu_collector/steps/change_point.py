"""When a series of seconds rose and stayed: Page's cumulative sum, with its error rates. Pure.

E. S. Page, "Continuous inspection schemes", Biometrika 41 (1954): S_t = max(0, S_(t-1) + x_t - level - drift) alarms
above a threshold, and the change began where S last left 0. With a drift of half the least shift it is the quickest
test for that shift. Siegmund's approximation (Sequential Analysis, Springer 1985) gives the mean time to an alarm, in
deviations, for normal independent seconds: (exp(-2 D b) + 2 D b - 1) / (2 D^2) with b = threshold + 1.166 and
D = shift - drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

LEAST_DEVIATIONS: Final = 2.5
"""Of the level, that a shift has at least. So D = -1.25 without one: a false alarm in 1.9e7 independent seconds. Three
left a rise by two thirds untold where the core's own speed varied by a quarter from second to second."""
DRIFT: Final = 0.5
"""... of the least shift."""
THRESHOLD: Final = 6.0
"""Deviations; the least shift is seen after 5.4 s on average."""
MIN_DEVIATION: Final = 0.03
"""Seconds are never taken to be more alike than this share of a step."""
MIN_BEFORE: Final = 20
"""Seconds that must tell what the level was; fewer have no median and deviation to speak of."""
PERSIST: Final = 15
"""Seconds after which a shift stays: what a shared core's speed wanders by is over in less."""
STAYS: Final = 0.9
"""Share of the last `PERSIST` seconds that must lie above half the shift."""


@dataclass(frozen=True, slots=True)
class Change:
    """A rise of a series. `begin` is the place of its first second; the rest are in the unit of the series."""

    begin: int
    level: float
    """Median before."""
    least: float
    """The least shift that is told here."""
    shift: float
    """Median of the last `PERSIST` seconds less the level."""
    share: float
    """Of the last `PERSIST` seconds since the change, that lie above half the least shift."""
    stays: bool
    """It has lasted and is large enough to be told; False: it may yet become so."""


def mean_time_to_alarm(shift: float) -> float:
    """Return Siegmund's mean number of seconds to an alarm, for a shift in deviations of normal independent seconds."""
    beyond, b = shift - DRIFT * LEAST_DEVIATIONS, THRESHOLD + 1.166
    if abs(beyond) < 1e-9:
        return b * b
    return (math.exp(-2 * beyond * b) + 2 * beyond * b - 1) / (2 * beyond * beyond)


def cumulative_sum(values: Float64, level: float, drift: float) -> Float64:
    """Return Page's S after each of `values`."""
    walked = np.cumsum(values - level - drift)
    found: Float64 = walked - np.minimum(np.minimum.accumulate(walked), 0.0)
    return found


def _walk(values: Float64, level: float, shift: float) -> Float64:
    """Return the cumulative sum that is quickest for a shift; one second counts for no more than it."""
    return cumulative_sum(np.minimum(values, level + shift), level, DRIFT * shift)


def _begin(total: Float64) -> int:
    """Return the place after the last at which a cumulative sum was 0."""
    zero = np.flatnonzero(total <= 0)
    return int(zero[-1]) + 1 if len(zero) else 0


def _level(before: Float64, least: float) -> tuple[float, float]:
    """Return the level of what came before, and the least shift that is told beside its noise."""
    level = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(before - level)))
    return level, max(least, LEAST_DEVIATIONS * max(deviation, MIN_DEVIATION))


def latest_change(values: Float64, least: float) -> Change | None:
    """Return the rise that the series is in, or None; least: the smallest shift that is to be told, before noise."""
    if len(values) < MIN_BEFORE + 2:
        return None
    level, told_from = _level(values[: max(MIN_BEFORE, len(values) - PERSIST)], least)
    total = _walk(values, level, told_from)
    if total[-1] <= THRESHOLD * told_from / LEAST_DEVIATIONS:
        return None
    begin = _begin(total)
    shift = float(np.median(values[begin:][-PERSIST:])) - level
    if shift > told_from and (again := _begin(_walk(values, level, shift))) < len(values):
        begin = max(begin, again)  # by the least shift a blip just before would be taken for part of a large one
    if begin < MIN_BEFORE:
        return None
    level, least = _level(values[:begin], least)  # as a rise lasts, more of it would count as what was before
    last = values[begin:][-PERSIST:]
    shift, share = float(np.median(last)) - level, float((last > level + least / 2).mean())
    stays = len(values) - begin >= PERSIST and shift >= least and share >= STAYS
    return Change(begin, level, least, shift, share, stays)
