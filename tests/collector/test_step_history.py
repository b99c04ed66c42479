"""Seconds of a rank: how much longer its steps took than expected, whatever the run queue's counter says beside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.baseline import OFF_CORE, Expectation, fit
from insitu_collector.steps.change_point import latest_change
from insitu_collector.steps.history import PER_SECOND, Float64, Seconds, matched, part

ON_NS, OFF_NS = 4e6, 0.5e6
NUM = 60


def seconds(queued_ns: Float64, more_off_ns: Float64) -> Seconds:
    """A minute of steps of 4.5 ms; by second, what the queue's counter says a step and what it took off the core."""
    rng = np.random.default_rng(3)
    shape = rng.integers(1, 9, (NUM, PER_SECOND, len(SHAPE))).astype(np.float64)
    wobble = rng.uniform(0.99, 1.01, (NUM, PER_SECOND))
    return Seconds(
        second=np.arange(NUM),
        num_steps=np.full(NUM, 80),
        cpu_ns=ON_NS * wobble,
        off_ns=OFF_NS * wobble + more_off_ns[:, None],
        queued_ns=queued_ns,
        shape=shape,
    )


def expected_of(found: Seconds) -> Expectation:
    shape = found.shape.reshape(-1, len(SHAPE))
    on, off = fit(shape, np.full(len(shape), ON_NS)), fit(shape, np.full(len(shape), OFF_NS), OFF_CORE)
    assert on is not None
    assert off is not None
    return Expectation(on, off)


def test_a_host_that_others_leave_has_not_become_slower() -> None:
    """The queue's delay counts waits before a step, which are in no step's time: when it goes nothing else changes."""
    queued = np.where(np.arange(NUM) < 30, 3e6, 0.0)
    found = seconds(queued, np.zeros(NUM))
    slower = found.slower(expected_of(found))
    assert np.abs(slower).max() < 0.03
    assert latest_change(slower, 0.25) is None


@pytest.mark.parametrize(("queued_ns", "said"), [(0.0, True), (2e6, False)])
def test_time_off_the_core_counts_as_far_as_the_run_queue_does_not_explain_it(queued_ns: float, said: bool) -> None:
    later = np.arange(NUM) >= 30
    found = seconds(np.where(later, queued_ns, 0.0), np.where(later, 2e6, 0.0))
    change = latest_change(found.slower(expected_of(found)), 0.25)
    assert (change is not None and change.stays) is said
    if change is not None:
        assert change.shift == pytest.approx(2 / 4.5, abs=0.03)


@given(st.integers(0, 59), st.floats(0.0, 5e6))
def test_the_queue_never_makes_steps_quicker_than_their_core_time(at: int, queued_ns: float) -> None:
    queued = np.zeros(NUM)
    queued[at] = queued_ns
    found = seconds(queued, np.full(NUM, 1e6))
    plain = seconds(np.zeros(NUM), np.full(NUM, 1e6)).slower(expected_of(found))
    slower = found.slower(expected_of(found))
    assert (slower <= plain + 1e-12).all()
    assert (slower >= -0.03).all()


def test_steps_of_equal_shape_are_compared_and_counted() -> None:
    found = seconds(np.zeros(NUM), np.zeros(NUM))
    found.shape[:] = 4.0
    before, after = part(found, slice(0, 30)), part(found, slice(30, None))
    after.cpu_ns[:] *= 2
    ratio, covered = matched(before, after)
    assert covered == 1.0
    assert ratio == pytest.approx((2 * ON_NS + OFF_NS) / (ON_NS + OFF_NS), rel=0.02)
    after.shape[:] = 8.0
    assert matched(before, after) == (1.0, 0.0)
