"""A token bucket keeps its rate over any stretch of time, whatever is booked and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.admission.bucket import BURST_S, TokenBucket

BOOKINGS = st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 500.0)), min_size=1, max_size=60)


def test_a_seconds_worth_is_there_at_once_and_what_is_beyond_waits() -> None:
    bucket = TokenBucket(10.0, now_s=0.0)
    bucket.book(10.0, 0.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.book(5.0, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(0.5)
    assert bucket.wait_s(0.25) == pytest.approx(0.25)
    assert bucket.wait_s(9.0) == 0.0


def test_an_amount_larger_than_the_bucket_gets_through_and_the_next_waits_for_it() -> None:
    bucket = TokenBucket(10.0, now_s=0.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.book(110.0, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(10.0)


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    bucket = TokenBucket(10.0, now_s=100.0)
    bucket.book(20.0, 100.0)
    assert bucket.wait_s(0.0) == bucket.wait_s(100.0) == pytest.approx(1.0)


@given(st.floats(0.5, 1000.0), BOOKINGS)
def test_who_waits_as_told_never_has_more_than_the_rate_and_one_burst(
    rate: float, bookings: list[tuple[float, float]]
) -> None:
    bucket, now, booked, last = TokenBucket(rate, now_s=0.0), 0.0, 0.0, 0.0
    for pause_s, amount in bookings:
        now += pause_s
        now += bucket.wait_s(now)
        assert bucket.wait_s(now) <= 1e-6, "it was told how long to wait, and has waited"
        booked, last = booked + amount, amount
        bucket.book(amount, now)
    assert booked - last <= rate * (now + BURST_S) * (1 + 1e-6) + 1e-6
