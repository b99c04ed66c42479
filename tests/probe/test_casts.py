"""The error of a cast is that of torch's own cast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from value_kit import part_of, read

from insitu.statistics import layout
from insitu.statistics.casts import FORMATS, formats, rounded, sample_of
from insitu.statistics.parts import combine, concat

Float32 = np.ndarray[Any, np.dtype[np.float32]]
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
VALUES = st.one_of(st.floats(-448, 448, width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, 2.0**-10, -448.0]))


def every_float(largest: float) -> torch.Tensor:
    """Return float32 numbers of every exponent, with mantissas around every tie of a short format."""
    mantissas = torch.cat([torch.arange(0, 1 << 23, 1 << 17) + offset for offset in (-1, 0, 1)]).clamp_min(0)
    bits = (torch.arange(90, 144)[:, None] << 23) + mantissas
    found = bits.to(torch.int32).view(torch.float32).reshape(-1)
    return torch.cat([found, -found])[torch.cat([found, found]) <= largest]


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_the_cast(name: str) -> None:
    at = list(DTYPES).index(name)
    x = every_float(FORMATS[at].largest)
    known = formats(torch.device("cpu"))[:, at : at + 1]
    cast, found = x.to(DTYPES[name]).float(), rounded(x[None, :, None, None], known).reshape(-1)
    assert torch.equal(found, cast)


def expected(x: Float32, name: str) -> tuple[float, float, float]:
    """Return mean squared error, the same over the mean square, and the share that is lost: by torch's cast."""
    values = torch.from_numpy(x)
    if name == "bf16":
        held = values.bfloat16().double()
    else:
        absmax = values.abs().max()
        largest = torch.tensor(torch.finfo(DTYPES[name]).max)
        scale = (largest / absmax).clamp_max(2.0**127) if absmax > 0 else torch.tensor(1.0)
        held = (values * scale).to(DTYPES[name]).double() / scale.double()
    exact = values.double()
    square = exact.square().mean()
    error = (held - exact).square().mean()
    lost = ((held == 0) & (exact != 0)).double().mean() if name != "bf16" else torch.tensor(0.0)
    return float(error), float(error / square), float(lost)


@settings(deadline=None)  # torch's own first calls are slow
@given(x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=VALUES))
@pytest.mark.parametrize("name", layout.CASTS)
def test_the_error_is_that_of_the_cast(name: str, x: Float32) -> None:
    found, absmax = read(part_of(torch.from_numpy(x))), float(np.abs(x).max())
    error, share, lost = expected(x, name)
    assert found[f"{name}_mse"] == pytest.approx(error, rel=1e-4, abs=1e-10 * absmax**2)
    if absmax > 0:
        assert found[f"{name}_noise"] == pytest.approx(share, rel=1e-4, abs=1e-9)
    else:
        assert np.isnan(found[f"{name}_noise"])
    assert found[f"{name}_lost_share"] == lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_what_the_format_holds_has_no_error(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.25, 1.0]]).to(dtype)
    found = read(part_of(x))
    assert found["bf16_mse"] == 0.0 and found["e4m3_lost_share"] == 0.0
    nothing = read(part_of(x[:0]))
    assert np.isnan(nothing["bf16_mse"]) and np.isnan(nothing["e4m3_lost_share"])


def test_what_is_not_finite_is_no_error() -> None:
    found = read(part_of(torch.tensor([[1.0, float("nan")], [float("inf"), 0.5]])))
    assert (found["e4m3_mse"], found["bf16_mse"]) == (0.0, 0.0)


def test_a_large_tensor_is_tried_in_rows_that_lie_evenly() -> None:
    for num_sites, num_rows, width in ((1, 4096, 256), (3, 100, 128), (2, 7, 40_000)):
        sample = sample_of(torch.randn(num_sites, num_rows, width))
        assert 0 < sample[0].numel() * num_sites <= max(layout.CAST_VALUES, num_sites * width)
    x = torch.arange(4096.0)[:, None].expand(4096, 256)
    rows = sample_of(x[None])[0, :, 0]
    assert len(set(rows.diff().tolist())) == 1 and len(rows) == layout.CAST_VALUES // 256


def test_parts_add_up() -> None:
    random = np.random.default_rng(1)
    matrices = [torch.from_numpy(random.normal(size=(n, 8)).astype(np.float32)) for n in (2, 5)]
    each = [read(part_of(x)) for x in matrices]
    whole = read(combine(concat([part_of(x) for x in matrices]), np.zeros(2, np.int64)))
    assert whole["e5m2_mse"] == pytest.approx((2 * each[0]["e5m2_mse"] + 5 * each[1]["e5m2_mse"]) / 7)
