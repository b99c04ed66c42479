"""Stages balanced by cost."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.errors import EngineError
from insitu_engine.split import balanced, checked, ranges


def costliest(costs: list[int], head: int, counts: tuple[int, ...]) -> int:
    sums = [sum(costs[r.start : r.stop]) for r in ranges(counts)]
    sums[-1] += head
    return max(sums)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 100), st.data())
def test_no_other_split_has_a_cheaper_costliest_stage(costs: list[int], head: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    found = balanced(costs, head, num_stages)
    assert len(found) == num_stages and sum(found) == len(costs) and min(found) >= 1
    every = [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), num_stages - 1)
    ]
    assert costliest(costs, head, found) == min(costliest(costs, head, counts) for counts in every)


def test_a_heavy_head_gets_fewer_layers() -> None:
    assert balanced([10] * 8, 0, 2) == (4, 4)
    assert balanced([10] * 8, 9, 2) == (4, 4)
    assert balanced([10] * 8, 25, 2) == (5, 3)


def test_ranges_are_global_layer_indices() -> None:
    assert ranges((3, 1, 2)) == (range(3), range(3, 4), range(4, 6))


@pytest.mark.parametrize("num_stages", [0, 9])
def test_more_stages_than_layers_is_refused_in_one_line(num_stages: int) -> None:
    with pytest.raises(EngineError, match=r"8 layers.*--stages 1\.\.8"):
        balanced([1] * 8, 0, num_stages)


@pytest.mark.parametrize("split", [(4, 3), (8,), (9, -1), (4, 4, 0)])
def test_a_split_that_does_not_fit_is_refused(split: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match="--split"):
        checked(split, 8, 2)


def test_a_split_that_fits_is_taken() -> None:
    assert checked((5, 3), 8, 2) == (5, 3)
