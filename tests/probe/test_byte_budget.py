"""Over any time a budget gives its rate, one second of what was not used, and one step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu.rules.byte_budget import BURST_S, Budget, LeftOut

STEPS = st.lists(st.tuples(st.integers(0, 2_000_000_000), st.integers(1, 5000)), max_size=60)


@given(st.integers(1, 4000), STEPS)
def test_no_stretch_of_time_takes_more_than_it_may(rate: int, steps: list[tuple[int, int]]) -> None:
    budget, t_ns, taken = Budget(rate), 0, []
    for gap_ns, num_bytes in steps:
        t_ns += gap_ns
        if budget.is_open(t_ns):
            budget.spend(num_bytes)
            taken.append((t_ns, num_bytes))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span_s = (taken[last][0] - taken[first][0]) / 1e9
            most = max(num_bytes for _, num_bytes in taken[first : last + 1])
            assert sum(num_bytes for _, num_bytes in taken[first : last + 1]) <= rate * (span_s + BURST_S) + most + 1e-6


@given(st.integers(1, 4000), STEPS)
def test_what_stays_within_the_rate_is_never_left_out(rate: int, steps: list[tuple[int, int]]) -> None:
    budget, t_ns = Budget(rate), 0
    for _, num_bytes in steps:
        assert budget.is_open(t_ns)
        budget.spend(num_bytes)
        t_ns += -(-num_bytes * 1_000_000_000 // rate)  # as long as it pays for


def test_an_overdrawn_budget_is_open_again_once_it_is_paid_for() -> None:
    budget = Budget(100)
    assert budget.is_open(0)
    budget.spend(300)
    assert not budget.is_open(1_000_000_000)
    assert not budget.is_open(2_000_000_000)
    assert budget.is_open(2_010_000_001)


def test_what_is_left_out_is_said_at_the_first_and_whenever_it_has_doubled() -> None:
    left_out = LeftOut()
    said = [number for number in range(20) if left_out.look(number) is not None]
    assert said == [1, 2, 4, 8, 16]
