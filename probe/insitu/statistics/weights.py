"""Statistics of sampled steps weighed by what each stands for, so that a period that changed favours no time. Pure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from insitu.statistics.parts import Count, Ints, Partials

_M2 = 1
"""Place of the sum of squared deviations among a figure's numbers."""


def weighed(parts: Partials, weights: Ints) -> Partials:
    """Return parts as if each had been told `weights` times: what adds up is multiplied, extremes and means stay.

    How many parts there are stays, too: `num_parts` counts what was measured.
    """
    counts = parts.counts * weights[:, None]
    counts[:, Count.PARTS] = parts.counts[:, Count.PARTS]
    figures = parts.figures.copy()
    figures[:, :, _M2] *= weights[:, None]
    moments = parts.moments.copy()
    moments[:, 1:] *= weights[:, None]
    return replace(
        parts,
        counts=counts,
        octaves=parts.octaves * weights[:, None],
        moments=moments,
        figure_num=parts.figure_num * weights[:, None],
        figures=figures,
        cast_num=parts.cast_num * weights[:, None, None],
        casts=parts.casts * weights[:, None, None],
    )


def relative(periods: Ints, group: Ints) -> Ints:
    """Return whole weights in proportion to the periods within each group; 0, where no period is known, weighs 1.

    They are the periods over the greatest divisor that those of the group have in common: 1 where none differs.
    """
    divisor: NDArray[np.int64] = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    np.gcd.at(divisor, group, periods)
    weights: Ints = np.where(periods > 0, periods // np.maximum(divisor[group], 1), 1)
    return weights
