"""The benchmark of predictions: what it draws, and when it says that they come true."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prediction import BASE, EXIT_DISTURBED, EXIT_MISSED, MOST_IN_FLIGHT, Row, drawn, summary


def row(predicted: float = 1.0, measured: float = 1.0, foreign: float = 0.0) -> Row:
    return Row((5, 3), 2, (600.0, 600.0 * measured), predicted, measured, 0.01, (0.0, foreign), again=False)


@given(st.integers(0, 2**32))
def test_pairs_follow_from_the_seed_and_are_never_the_base(seed: int) -> None:
    first = list(islice(drawn(seed), 20))
    assert first == list(islice(drawn(seed), 20))
    assert BASE not in first
    assert all(sum(split) == 8 and min(split) >= 1 and 1 <= in_flight <= MOST_IN_FLIGHT for split, in_flight in first)


@pytest.mark.parametrize(("measured", "right"), [(1.29, True), (0.71, True), (1.31, False), (0.69, False)])
def test_right_is_within_thirty_per_cent_of_the_predicted_ratio(measured: float, right: bool) -> None:
    assert row(measured=measured).is_right is right
    assert row(predicted=2.0, measured=2.0 * measured).is_right is right


def test_nine_of_ten_quiet_pairs_meet_the_bar() -> None:
    assert summary([row()] * 18 + [row(measured=2.0)] * 2)[1] == 0
    assert summary([row()] * 17 + [row(measured=2.0)] * 3)[1] == EXIT_MISSED


def test_pairs_that_others_disturbed_do_not_count() -> None:
    said, code = summary([row()] * 12 + [row(measured=3.0, foreign=0.5)] * 8)
    assert (code, "12 of 12 quiet pairs" in said, "of all 20 pairs 12" in said) == (0, True, True)
    assert summary([row()] * 5 + [row(foreign=0.5)] * 15)[1] == EXIT_DISTURBED
