"""The kit for statistics lets a right one pass, and each kind of wrong one is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from insitu.plugins.discovery import Broken
from insitu.statistic_plugins import Statistic
from insitu.testing import check_statistic

Floats = NDArray[np.float64]


class Moments(Statistic):
    """Right: count, mean and squared deviations of all values."""

    fields = ("num", "mean", "m2")

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        mean = x.mean()
        return torch.stack([torch.full_like(mean, x.numel()), mean, (x - mean).square().sum()])

    def combine(self, a: Floats, b: Floats) -> Floats:
        (num, mean, m2), (num_b, mean_b, m2_b) = a.T, b.T
        total, apart = num + num_b, mean_b - mean
        return np.stack([total, mean + apart * num_b / total, m2 + m2_b + apart**2 * num * num_b / total], 1)

    def finalise(self, parts: Floats) -> Mapping[str, NDArray[Any]]:
        return {"mean": parts[:, 1], "std": np.sqrt(parts[:, 2] / parts[:, 0])}


class OfColumns(Statistic):
    """Right: takes columns by place, which waits for nobody."""

    fields = ("first", "last")

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()[:, torch.tensor([0, -1])].sum(0)


@pytest.mark.parametrize("statistic", [Moments(), OfColumns()])
def test_a_right_one_passes(statistic: Statistic) -> None:
    assert check_statistic(statistic).startswith("parts add up over 90 splits")


class InSingle(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute(x.float()).float()


class MeanOfMeans(Moments):
    def combine(self, a: Floats, b: Floats) -> Floats:
        return np.stack([a[:, 0] + b[:, 0], (a[:, 1] + b[:, 1]) / 2, a[:, 2] + b[:, 2]], 1)


class TheLater(Statistic):
    fields = ("last",)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:, 0]

    def combine(self, a: Floats, b: Floats) -> Floats:
        return b


class Drops(Statistic):
    fields = ("largest",)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().amax().reshape(1)

    def combine(self, a: Floats, b: Floats) -> Floats:
        return np.fmax(a, b)


class Pairwise(Moments):
    def combine(self, a: Floats, b: Floats) -> Floats:
        return super().combine(a, b) + (len(a) > 1)


class Writes(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute(x.clamp_(min=0))


class WritesParts(Moments):
    def combine(self, a: Floats, b: Floats) -> Floats:
        found = super().combine(a, b)
        a += 1
        return found


class ReadsBack(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute(x if x.isfinite().all() else x.nan_to_num())


class Masks(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute(x[x.isfinite()])


class Draws(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return super().compute(x + 0 * torch.rand(1))


class Counts(Moments):
    def __init__(self) -> None:
        self.num_calls = 0

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return super().compute(x) + self.num_calls


class Scalar(Moments):
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Ranks(Moments):
    def finalise(self, parts: Floats) -> Mapping[str, NDArray[Any]]:
        return {"rank": np.argsort(np.argsort(parts[:, 1], kind="stable"), kind="stable")}


class Short(Moments):
    def combine(self, a: Floats, b: Floats) -> Floats:
        return (a + b)[:, :2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (InSingle, "float64, is not the part of the whole|float64 is not the part of the whole"),
        (MeanOfMeans, "is not the part of the whole: mean is"),
        (TheLater, "it matters which comes first"),
        (Drops, "a sample with a NaN .*is not the part of the whole"),
        (Pairwise, "a pair beside other pairs has another sum"),
        (Writes, "changed the tensor it was given"),
        (WritesParts, "combine changed the parts"),
        (ReadsBack, "reads a value back to the host"),
        (Masks, "reads a value back to the host"),
        (Draws, "draws random numbers"),
        (Counts, "other numbers the second time"),
        (Scalar, r"gave torch.float64\[\], not a vector of its 3 fields"),
        (Ranks, "finalise gives rank of a part as 0 alone"),
        (Short, "combine of .* gave"),
    ],
)
def test_a_wrong_one_is_told_what_is_wrong(make: type[Statistic], message: str) -> None:
    with pytest.raises(Broken, match=message):
        check_statistic(make())


def test_what_it_raises_itself_comes_through() -> None:
    class Raises(Moments):
        def compute(self, x: torch.Tensor) -> torch.Tensor:
            raise OSError("no licence")

    with pytest.raises(OSError, match="no licence"):
        check_statistic(Raises())
