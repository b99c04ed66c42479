"""A statistic plug-in: how long rows are. Sinks of attention are far longer than others, tokens that died out shorter.

How to write one: docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from insitu.statistic_plugins import Statistic

Floats = NDArray[np.float64]


class RowNorm(Statistic):
    """The Euclidean norm of each row: how many rows, their mean, how far they lie from it, the least, the greatest."""

    fields = ("num", "mean", "m2", "least", "greatest")

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x.double(), dim=1)
        mean = norm.mean()
        return torch.stack(
            [torch.full_like(mean, len(norm)), mean, (norm - mean).square().sum(), norm.amin(), norm.amax()]
        )

    def combine(self, a: Floats, b: Floats) -> Floats:
        (num, mean, m2, least, greatest), (num_b, mean_b, m2_b, least_b, greatest_b) = a.T, b.T
        total, apart = num + num_b, mean_b - mean
        return np.stack(
            [
                total,
                mean + apart * num_b / total,
                m2 + m2_b + apart**2 * num * num_b / total,
                np.minimum(least, least_b),
                np.maximum(greatest, greatest_b),
            ],
            1,
        )

    def finalise(self, parts: Floats) -> Mapping[str, Floats]:
        num, mean, m2, least, greatest = parts.T
        return {"num_rows": num, "mean": mean, "std": np.sqrt(m2 / num), "min": least, "max": greatest}
