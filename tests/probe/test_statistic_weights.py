"""A part of weight w adds up with others as if it had been told w times."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from value_kit import parts_of

from insitu.statistics.parts import Count, Ints, Partials, combine
from insitu.statistics.weights import relative, weighed

seeds = st.integers(0, 2**32 - 1)
weight_lists = st.lists(st.integers(1, 8), min_size=1, max_size=6)


@given(seeds, weight_lists)
@settings(max_examples=25, deadline=None)
def test_a_weight_is_so_many_times_the_same_part(seed: int, weights: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = parts_of([rng.normal(rng.normal(), 2, (rng.integers(1, 9), 16)).astype(np.float32) for _ in weights])
    times = np.array(weights, np.int64)
    found = combine(weighed(parts, times), np.zeros(len(parts), np.int64))
    index = np.repeat(np.arange(len(parts)), times)
    expected = combine(parts.take(index), np.zeros(len(index), np.int64))
    assert_same(found, expected)
    assert found.counts[0, Count.PARTS] == len(parts), "what was measured, not what it stands for"


def assert_same(found: Partials, expected: Partials) -> None:
    for field in fields(Partials):
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "counts":
            have, want = have[:, Count.PARTS + 1 :], want[:, Count.PARTS + 1 :]
        np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6, err_msg=field.name)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=20))
def test_weights_are_whole_in_proportion_and_as_small_as_can_be(drawn: list[tuple[int, int]]) -> None:
    group: Ints = np.array([number for number, _ in drawn], np.int64)
    periods: Ints = np.array(
        [0 if power == 7 else (16, 24, 16, 5)[number] << power for number, power in drawn], np.int64
    )
    weights = relative(periods, group)
    for number in set(group.tolist()):
        mine, of = weights[group == number], periods[group == number]
        known = of > 0
        assert (mine[~known] == 1).all()
        if known.any():
            assert np.gcd.reduce(mine[known]) == 1
            assert len(set((of[known] / mine[known]).tolist())) == 1


def test_where_no_period_differs_every_weight_is_one() -> None:
    assert relative(np.full(5, 4096, np.int64), np.zeros(5, np.int64)).tolist() == [1] * 5
    assert relative(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
