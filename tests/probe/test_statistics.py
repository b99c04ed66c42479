"""Parts add up to the whole, in whatever order and grouping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from value_kit import Float32, assert_told, dealt, part_of, parts_of, read

from insitu.statistics.parts import combine, finalise

OF_THE_PART = ("near_zero_share", "outlier_share")
"""Shares by a threshold of each part's own: they add up, and are not those of the whole as one part."""


@settings(deadline=None)  # torch's own first calls are slow
@given(matrices=dealt())
def test_parts_of_steps_are_the_whole(matrices: list[Float32]) -> None:
    parts = parts_of(matrices)
    whole = np.concatenate(matrices).astype(np.float64)
    found = read(combine(parts, np.zeros(len(parts), np.int64)))
    steps = np.repeat(np.arange(len(matrices)), [len(x) for x in matrices])
    rows = np.concatenate([np.arange(len(x)) for x in matrices])
    for name in ("first_bad", "absmax"):  # the oracle numbers rows through; here they have a step
        at = (steps == found[f"{name}_step"]) & (rows == found[f"{name}_row"])
        assert at.sum() == (found[f"{name}_row"] >= 0)
        found[f"{name}_row"] = int(np.flatnonzero(at)[0]) if at.any() else -1
    each = [read(parts, at) for at in range(len(parts))]
    num = np.array([np.isfinite(x).sum() for x in matrices])
    for name in OF_THE_PART:
        shares = np.array([part[name] for part in each])
        if num.sum():
            assert found[name] == pytest.approx((shares[num > 0] * num[num > 0]).sum() / num.sum(), rel=1e-12)
        found[name] = read(part_of(torch.from_numpy(np.concatenate(matrices))))[name]
    assert_told(found, whole)
    assert found["num_parts"] == len(matrices)


@settings(deadline=None)  # torch's own first calls are slow
@given(matrices=dealt(), data=st.data())
def test_grouping_and_order_do_not_matter(matrices: list[Float32], data: st.DataObject) -> None:
    parts = parts_of(matrices)
    together = read(combine(parts, np.zeros(len(parts), np.int64)))
    order = np.array(data.draw(st.permutations(range(len(parts)))), np.int64)
    group = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(parts), max_size=len(parts))), np.int64)
    some = combine(parts.take(order), group)
    assert len(some) == len(set(group.tolist()))
    again = read(combine(some, np.zeros(len(some), np.int64)))
    for name, value in together.items():
        if name in ("skew", "kurtosis"):
            assert again[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
        elif isinstance(value, float):
            assert again[name] == pytest.approx(value, rel=1e-9, abs=1e-9 * abs(together["rms"]), nan_ok=True), name
        else:
            assert again[name] == value, name


def test_groups_keep_apart() -> None:
    random = np.random.default_rng(1)
    matrices = [random.normal(mean, 1, (3, 5)).astype(np.float32) for mean in (0, 100, 0, 100)]
    found = finalise(combine(parts_of(matrices), np.array([9, 2, 9, 2])))
    for at, of in ((0, (1, 3)), (1, (0, 2))):  # groups in order of their numbers
        values = np.concatenate([matrices[i] for i in of]).astype(np.float64)
        assert found["mean"][at] == pytest.approx(values.mean())
        assert found["std"][at] == pytest.approx(values.std())
        assert found["kurtosis"][at] == pytest.approx((((values - values.mean()) / values.std()) ** 4).mean())


def test_equal_values_do_not_vary_however_many_steps() -> None:
    parts = parts_of([np.full((n, 7), 0.1, np.float32) for n in (1, 3, 9)])
    found = read(combine(parts, np.zeros(3, np.int64)))
    assert found["std"] == 0.0 and np.isnan(found["kurtosis"]) and np.isnan(found["skew"])


def test_nothing_is_combined_of_nothing() -> None:
    nothing = parts_of([np.zeros((1, 2), np.float32)]).take(slice(0, 0))
    assert len(combine(nothing, np.zeros(0, np.int64))) == 0
    assert all(len(values) == 0 for values in finalise(nothing).values())


def test_the_largest_channels_of_all_steps_are_found() -> None:
    width, steps = 40, 7
    random = np.random.default_rng(2)
    matrices = [random.normal(0, 1, (4, width)).astype(np.float32) for _ in range(steps)]
    for step, channel in enumerate((3, 17, 30)):
        matrices[step][step % 4, channel] = 90.0 + step
    found = read(combine(parts_of(matrices), np.zeros(steps, np.int64)))
    assert found["outlier_channels"] == [30, 17, 3, -1, -1, -1, -1, -1]
    assert (found["absmax_step"], found["absmax_row"], found["absmax_channel"]) == (2, 2, 30)
