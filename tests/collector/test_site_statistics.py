"""Statistics of sites add up, whatever way the steps were dealt out, and tell when values have moved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu_collector.values.summaries import Moments, shift, site_statistics

NUMBERS = st.lists(st.floats(-1e6, 1e6), max_size=40)


@given(first=NUMBERS, second=NUMBERS, third=NUMBERS)
def test_moments_of_parts_are_moments_of_the_whole(first: list[float], second: list[float], third: list[float]) -> None:
    parts = [Moments.of(np.array(part, np.float64)) for part in (first, second, third)]
    whole = np.array(first + second + third, np.float64)
    for found in (parts[0].merged(parts[1]).merged(parts[2]), parts[0].merged(parts[1].merged(parts[2]))):
        assert found.num == len(whole)
        if len(whole):
            assert found.mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-6)
            assert found.squares == pytest.approx(np.square(whole - whole.mean()).sum(), rel=1e-6, abs=1e-2)


def test_a_shift_is_in_deviations_and_in_standard_errors() -> None:
    random = np.random.default_rng(1)
    before, after = (Moments.of(random.normal(mean, 2.0, 4_000)) for mean in (10.0, 11.0))
    found = shift(before, after)
    assert found is not None
    assert found.size == pytest.approx(0.5, abs=0.06)
    assert found.errors == pytest.approx(0.5 * math.sqrt(2_000), rel=0.12)


def test_two_constants_that_differ_are_infinitely_far_apart_and_one_number_says_nothing() -> None:
    ones, twos = Moments.of(np.ones(5)), Moments.of(2 * np.ones(5))
    found = shift(ones, twos)
    assert found is not None and found.size == math.inf
    same = shift(ones, ones)
    assert same is not None and same.size == 0.0
    assert shift(ones, Moments.of(np.ones(1))) is None


def summaries(rows: list[dict[str, Any]]) -> pa.Table:
    full = [{"epoch": 1, "stage": 0, "row_seq": place, **row} for place, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema_of("summaries"))


SITES = pa.Table.from_pylist(
    [{"epoch": 1, "rank": rank, "stage": 0, "row_seq": rank, "site": 7, "name": "logits"} for rank in (0, 1)],
    schema=schema_of("sites"),
)


def test_ranks_that_hold_one_site_add_up_and_bad_steps_are_counted_apart() -> None:
    good: dict[str, Any] = {
        "site": 7,
        "num_rows": 2,
        "canary": 1.0,
        "row_sum": 6.0,
        "absmax": 4.0,
        "nonfinite_rows": None,
    }
    bad = good | {"canary": math.nan, "row_sum": math.nan, "absmax": math.inf, "nonfinite_rows": [1]}
    rows = [{**good, "rank": 0, "step_id": 1}, {**good, "rank": 1, "step_id": 1}, {**bad, "rank": 1, "step_id": 2}]
    found = site_statistics(summaries(rows), SITES)
    assert found.keys() == {"logits"}
    assert (found["logits"].num_steps, found["logits"].num_nonfinite) == (3, 1)
    assert found["logits"].row_sum == Moments(2, 3.0, 0.0)
    assert found["logits"].absmax == Moments(2, 2.0, 0.0)


def test_a_site_nobody_named_and_an_empty_table_say_nothing() -> None:
    row: dict[str, Any] = {
        "site": 9,
        "num_rows": 1,
        "canary": 1.0,
        "row_sum": 1.0,
        "absmax": 1.0,
        "rank": 0,
        "step_id": 1,
    }
    assert site_statistics(summaries([row]), SITES) == {}
    assert site_statistics(summaries([]), SITES) == {}
