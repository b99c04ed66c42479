"""What statistics of a matrix must be, in float64 numpy, by the definitions of docs/probe.md and nothing cleverer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from insitu.statistics import layout
from insitu.statistics.parts import Partials, concat, finalise, from_places
from insitu.statistics.reductions import Places, compute
from insitu.statistics.workspace import Workspace

Matrix = NDArray[np.float64]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
WORK = Workspace(torch.device("cpu"))


def used_places(num: int) -> Places:
    """Return places that hold what another step left, in another order than that of the sites."""
    return Places(
        torch.full((num, layout.NUM_INTS), 77, dtype=torch.int64),
        torch.full((num, layout.NUM_FLOATS), 7.7, dtype=torch.float64),
        torch.arange(num).flip(0),
    )


def told_by(x: torch.Tensor, step: int = 0, work: Workspace | None = None, **options: Any) -> Partials:
    """Return the parts that the device makes of [sites, rows, width], in order of the sites."""
    places = used_places(len(x))
    compute(x, places, work or WORK, torch.tensor(step), **options)
    ints, floats = places.ints.flip(0).numpy(), places.floats.flip(0).numpy()
    assert (ints[:, layout.STAMP] == step).all()
    return from_places(np.full(len(x), step), ints, floats)


def part_of(
    x: torch.Tensor,
    step: int = 0,
    work: Workspace | None = None,
    *,
    is_logits: bool = False,
    source: torch.Tensor | None = None,
) -> Partials:
    """Return the part that the device makes of a matrix."""
    before = {} if source is None else {"source": source[None], "sourced": (0,)}
    return told_by(x[None], step, work, has_scores=is_logits, **before)


@st.composite
def dealt(draw: st.DrawFn) -> list[Float32]:
    """Return matrices of one width, some without rows: what steps left."""
    width = draw(st.integers(1, 12))
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    values = st.one_of(st.floats(width=32), st.floats(-100, 100, width=32), st.sampled_from([0.0, float("nan"), 7.0]))
    return [draw(hnp.arrays(np.float32, (n, width), elements=values)) for n in rows]


def parts_of(matrices: list[Float32]) -> Partials:
    """Return a part of each, with figures of logits; its step is its place in the list."""
    return concat([part_of(torch.from_numpy(x), step, is_logits=True) for step, x in enumerate(matrices)])


def read(parts: Partials, at: int = 0) -> dict[str, Any]:
    """Return what is told of one part."""
    return {name: values[at].tolist() for name, values in finalise(parts).items()}


def assert_told(found: dict[str, Any], x: Matrix) -> None:
    """Assert that what is told of one step's matrix, as float32 holds it, is true."""
    finite = np.isfinite(x)
    assert found["num_rows"] == len(x)
    assert found["num_values"] == x.size
    assert (found["num_nan"], found["num_inf"]) == (np.isnan(x).sum(), np.isinf(x).sum())
    assert found["first_bad_row"] == next((row for row in range(len(x)) if not finite[row].all()), -1)
    if not finite.any():
        assert found["absmax_row"] == found["absmax_channel"] == -1
        assert all(np.isnan(found[name]) for name in ("absmax", "mean", "rms", "std", "zero_share", "dynamic_range"))
        return
    _assert_sizes(found, *(np.where(finite, np.abs(x), size) for size in (0.0, -1.0)))
    _assert_moments(found, x[finite])
    _assert_shares(found, np.abs(x[finite]))


def _assert_sizes(found: dict[str, Any], size: Matrix, finite_size: Matrix) -> None:
    """What is not finite has size 0, or less than any: where all else is 0, either row may be named."""
    assert found["absmax"] == size.max()
    assert found["absmax_row"] in (size.max(1).argmax(), finite_size.max(1).argmax())
    assert size[:, found["absmax_channel"]].max() == size.max()
    channels = size.max(0)
    outliers = found["outlier_channels"]
    named = [channel for channel in outliers if channel >= 0]
    assert len(set(named)) == len(named)
    largest = np.sort(channels)[::-1][: layout.NUM_CHANNELS]
    assert channels[named].tolist() == largest[: len(named)].tolist()
    told = found["beyond_channels"]
    assert sum(channel >= 0 for channel in told) == (largest > layout.BEYOND).sum()


def _assert_moments(found: dict[str, Any], values: Matrix) -> None:
    mean, deviation = values.mean(), values - values.mean()
    std = np.sqrt(np.square(deviation).mean())
    scale = np.abs(values).max()
    assert found["mean"] == pytest.approx(mean, rel=1e-12, abs=1e-14 * scale)
    assert found["sum"] == pytest.approx(values.sum(), rel=1e-12, abs=1e-14 * scale * values.size)
    assert found["rms"] == pytest.approx(np.sqrt(np.square(values).mean()), rel=1e-9)
    assert found["std"] == pytest.approx(std, rel=1e-9, abs=1e-13 * scale)
    if std > 1e-5 * scale:
        z = deviation / std
        assert found["skew"] == pytest.approx((z**3).mean(), rel=1e-8, abs=1e-8)
        assert found["kurtosis"] == pytest.approx((z**4).mean(), rel=1e-8)
    elif len(set(values.tolist())) == 1:
        assert (found["std"], found["skew"], found["kurtosis"]) == pytest.approx((0.0, np.nan, np.nan), nan_ok=True)


def _assert_shares(found: dict[str, Any], size: Matrix) -> None:
    rms, num = np.sqrt(np.square(size).mean()), size.size
    assert found["zero_share"] == (size == 0).sum() / num
    for name, factor, is_over in (("outlier", layout.OUTLIER_RMS, True), ("near_zero", layout.NEAR_ZERO_RMS, False)):
        lowest, highest = (float((size > factor * rms * (1 + slack) + slack * 1e-38).sum()) for slack in (1e-6, -1e-6))
        over = found[f"{name}_share"] * num
        over = over if is_over else num - over
        assert lowest - 1e-6 <= over <= highest + 1e-6, f"{name}: {over} of {num}, threshold {factor * rms}"
    for name, (under, largest) in (("e4m3", layout.E4M3), ("e5m2", layout.E5M2)):
        assert found[f"{name}_over_share"] == (size > largest).sum() / num
        assert found[f"{name}_under_share"] == ((size > 0) & (size <= under)).sum() / num
    assert found["beyond_share"] == (size > layout.BEYOND).sum() / num
    kept = size[size > 0]
    if len(kept):
        assert found["dynamic_range"] == pytest.approx(np.log2(kept.max() / kept.min()), rel=1e-12, abs=1e-12)
        mantissa, exponent = np.frexp(kept)
        octave = np.where(mantissa == 0.5, exponent - 2, exponent - 1)
    else:
        assert np.isnan(found["dynamic_range"])
        octave = np.zeros(0, np.int64)
    place = np.clip(octave - layout.FIRST_OCTAVE, 0, layout.NUM_OCTAVES - 1)
    assert found["octaves"] == np.bincount(place, minlength=layout.NUM_OCTAVES).tolist()
