"""Stretches laid over each other, against counting each moment by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.requests.cover import cover, expand

Stretch = tuple[int, int, int]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 12)), max_size=12))
def test_each_moment_is_covered_as_often_as_stretches_hold_there(stretches: list[Stretch]) -> None:
    columns = np.array(stretches, np.int64).reshape(-1, 3).T
    found = cover(*columns)
    assert (found.end > found.begin).all()
    pieces = list(zip(found.key.tolist(), found.begin.tolist(), found.end.tolist(), strict=True))
    assert pieces == sorted(pieces)
    for key in range(3):
        mine = [(n, t0, t1) for n, (k, t0, t1) in enumerate(stretches) if k == key and t1 > t0]
        edges = [edge for _, t0, t1 in mine for edge in (t0, t1)]
        for moment in range(13):
            there = [n for n, t0, t1 in mine if t0 <= moment < t1]
            piece = (found.key == key) & (found.begin <= moment) & (moment < found.end)
            assert piece.sum() == (min(edges) <= moment < max(edges) if edges else 0)
            if piece.any():
                assert (found.depth[piece][0], found.total[piece][0]) == (len(there), sum(there))


def test_a_piece_says_which_stretch_began_with_it() -> None:
    found = cover(np.zeros(3, np.int64), np.array([10, 14, 30]), np.array([20, 16, 40]))
    assert found.begin.tolist() == [10, 14, 16, 20, 30]
    assert found.begun.tolist() == [0, 1, -1, -1, 2]


def test_ranges_are_counted_out() -> None:
    of, members = expand(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert of.tolist() == [0, 0, 2, 2, 2]
    assert members.tolist() == [5, 6, 9, 10, 11]
