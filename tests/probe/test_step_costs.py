"""What full steps cost is the difference to quiet ones of the same shape, whatever shapes and burdens there are."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.overhead.step_costs import ENOUGH, KEPT, STALE_WINDOWS, Burden, HostClock, Shape, StepCosts
from insitu.session.step import StepRecord

DECODE: Shape = (1, 4)
PREFILL: Shape = (0, 9)


def feed(
    costs: StepCosts, shape: Shape, quiet_ns: float, slope: float, burden: float, *, num: int = 2 * ENOUGH
) -> None:
    """Take in so many quiet and full steps of a shape, of which a unit of burden costs `slope`."""
    for _ in range(num):
        costs.add(shape, quiet_ns, Burden(burden / 2))
        costs.add(shape, quiet_ns + slope * burden, Burden(burden / 2, burden))


def is_blind(costs: StepCosts) -> bool:
    return costs.is_blind


times = st.floats(1e3, 1e9)
slopes = st.floats(0, 50)
burdens = st.floats(1e2, 1e7)


@given(times, slopes, burdens, times, slopes, burdens)
def test_each_shape_has_its_own_cost(
    quiet: float, slope: float, burden: float, other: float, steep: float, more: float
) -> None:
    costs = StepCosts()
    feed(costs, DECODE, quiet, slope, burden)
    feed(costs, PREFILL, other, steep, more)
    num = 4 * ENOUGH
    full_ns, named_ns = costs.close()
    assert full_ns == pytest.approx(num * (slope * burden + steep * more) / 2, rel=1e-3, abs=num)
    assert named_ns == 0
    assert costs.taken_ns == pytest.approx(full_ns, rel=1e-3, abs=num), "half of the steps took all their burden"


@given(times, st.floats(0.1, 50), burdens, st.integers(0, 2**32))
def test_some_steps_that_take_far_too_long_change_nothing(quiet: float, slope: float, burden: float, seed: int) -> None:
    costs = StepCosts()
    for at in range(KEPT):
        late = 1e10 if (at + seed) % 3 == 0 else 0.0  # a page fault, another process: a third of both kinds
        costs.add(DECODE, quiet + late, Burden(burden))
        costs.add(DECODE, quiet + slope * burden + (1e10 if (at + seed) % 3 == 1 else 0.0), Burden(burden, burden))
    full_ns, _ = costs.close()
    assert full_ns == pytest.approx(2 * KEPT * slope * burden, rel=1e-3, abs=2 * KEPT)


def test_what_was_asked_by_name_is_told_apart() -> None:
    costs = StepCosts()
    feed(costs, DECODE, 1e6, 2.0, 1e4)
    costs.close()
    costs.add(DECODE, 1e6 + 3e4, Burden(expected=5e3, named=1.5e4))
    assert costs.close() == pytest.approx((1e4, 3e4))


def test_a_shape_without_quiet_steps_costs_in_proportion_to_others() -> None:
    costs = StepCosts()
    feed(costs, DECODE, 1e6, 3.0, 1e4)
    for _ in range(ENOUGH):
        costs.add(PREFILL, 1e7, Burden(1e4))
    costs.close()
    costs.add(PREFILL, 4e7, Burden(1e4, 1e4))
    full_ns, _ = costs.close()
    assert full_ns == pytest.approx(10 * 3.0 * 1e4), "ten times the quiet step, ten times the cost of a unit"


def test_where_every_step_is_full_it_is_blind_until_some_are_quiet() -> None:
    costs = StepCosts()
    assert not is_blind(costs)
    for _ in range(10):
        costs.add(DECODE, 5e6, Burden(1e4, 1e4))
    assert is_blind(costs)
    assert costs.close() == (10 * 1e4, 0.0), "as calibrated"
    for _ in range(ENOUGH):
        costs.add(DECODE, 1e6, Burden(1e4))
    assert not is_blind(costs)
    assert costs.close() == pytest.approx((ENOUGH * 4e6, 0.0)), "those that waited are compared too"


def test_quiet_steps_of_long_ago_are_forgotten() -> None:
    costs = StepCosts()
    feed(costs, DECODE, 1e6, 2.0, 1e4)
    costs.close()
    for _ in range(STALE_WINDOWS):
        assert not is_blind(costs)
        costs.add(DECODE, 9e6, Burden(1e4, 1e4))
        costs.close()
    for _ in range(ENOUGH):
        costs.add(DECODE, 9e6, Burden(1e4, 1e4))
    assert is_blind(costs)


def test_a_machine_that_becomes_slower_is_compared_with_itself() -> None:
    costs = StepCosts()
    feed(costs, DECODE, 1e6, 2.0, 1e4)
    for _ in range(KEPT):
        costs.add(DECODE, 1e8, Burden(1e4))
    costs.close()
    costs.add(DECODE, 1e8, Burden(1e4))
    assert costs.close()[0] == pytest.approx(2e4), "full steps of before are not compared with quiet ones of now"


def record() -> StepRecord:
    return StepRecord(0, 0, None, 0, None, None, 0, 0)


def test_the_host_clock_counts_work_and_not_waiting() -> None:
    clock, step = HostClock(), record()
    assert clock.read(step) is None
    clock.begin(step)
    waited = threading.Event()
    waited.wait(0.05)
    end = time.thread_time_ns() + 5_000_000
    while time.thread_time_ns() < end:
        pass
    clock.end(step)
    spent = clock.read(step)
    assert spent is not None and 5e6 <= spent < 4.5e7


def test_a_step_that_ends_on_another_thread_is_timed_by_the_wall() -> None:
    clock, step = HostClock(), record()
    clock.begin(step)
    began = time.monotonic_ns()
    thread = threading.Thread(target=lambda: clock.end(step))
    thread.start()
    thread.join()
    spent = clock.read(step)
    assert spent is not None and 0 < spent <= time.monotonic_ns() - began + 50_000_000


def test_a_step_that_never_began_has_no_time() -> None:
    clock, step = HostClock(), record()
    clock.end(step)
    assert clock.read(step) is None
