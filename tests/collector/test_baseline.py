"""The baseline: what a healthy step takes, learnt through noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.baseline import MIN_STEPS, MOST_STEPS, SKIP_FIRST, Baseline, fit
from insitu_collector.steps.times import Float64, StepTimes

MS = 1e6


def shapes(random: np.random.Generator, count: int) -> Float64:
    """Decode batches of 1..8 requests, one in five with a prefill."""
    requests = random.integers(1, 9, count).astype(np.float64)
    prefill = np.where(random.random(count) < 0.2, random.integers(8, 64, count), 0).astype(np.float64)
    context = requests * random.integers(10, 300, count)
    return np.stack([requests + prefill, prefill, context, requests, requests], axis=1)


def busy(shape: Float64) -> Float64:
    """The truth: 5 ms, and a price of rows, prefill and context."""
    return np.asarray(5 * MS + 0.1 * MS * shape[:, 0] + 0.05 * MS * shape[:, 1] + 500.0 * shape[:, 2])


def times(shape: Float64, busy_ns: Float64, begin: int = 0) -> StepTimes:
    count = len(shape)
    order = np.arange(count) + begin
    return StepTimes(order, order, busy_ns, 0.9 * busy_ns, np.zeros(count), shape, np.zeros(count, bool))


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.15), st.floats(0.0, 0.25))
@settings(max_examples=40, deadline=None)
def test_the_fit_finds_the_truth_through_a_heavy_tail(seed: int, noise: float, tail: float) -> None:
    random = np.random.default_rng(seed)
    shape = shapes(random, 400)
    measured = busy(shape) * np.exp(random.normal(0, noise, 400))
    measured += np.where(random.random(400) < tail, random.exponential(20 * MS, 400), 0)
    found = fit(shape, measured)
    assert found is not None
    asked = shapes(random, 200)
    off = np.median(np.abs(found.ns(asked) / busy(asked) - 1))
    assert off < 0.03 + noise / 3 + tail / 3
    assert abs(np.median(measured - found.ns(shape))) < 1e-3 * MS
    assert (found.coefficients[1:] >= 0).all()


def test_too_few_steps_fit_nothing() -> None:
    shape = shapes(np.random.default_rng(0), MIN_STEPS - 1)
    assert fit(shape, busy(shape)) is None


def test_the_error_is_large_where_nothing_was_learnt() -> None:
    random = np.random.default_rng(1)
    shape = np.ones((100, len(SHAPE)))
    found = fit(shape, 5 * MS * np.exp(random.normal(0, 0.05, 100)))
    assert found is not None
    assert found.error_ns(shape) < 0.1 * MS
    assert found.error_ns(40 * shape) > 10 * found.error_ns(shape)
    assert found.error_ns(shape[:0]) == 0.0


def test_the_first_steps_of_a_rank_are_not_learnt() -> None:
    random = np.random.default_rng(2)
    shape = shapes(random, 60)
    measured = busy(shape)
    measured[:SKIP_FIRST] *= 50
    baseline = Baseline()
    baseline.learn(0, times(shape[:2], measured[:2]))
    baseline.learn(0, times(shape[2:], measured[2:]))
    assert baseline.num_steps(0) == 60 - SKIP_FIRST
    found = baseline.expectation(0)
    assert found is not None
    assert found.busy_ns(shape) == pytest.approx(busy(shape), rel=0.01)


def test_memory_is_bounded_and_follows_slow_drift() -> None:
    random = np.random.default_rng(3)
    baseline = Baseline()
    for part in range(30):
        shape = shapes(random, 200)
        factor = 1.0 if part < 10 else 1.3
        baseline.learn(0, times(shape, factor * busy(shape)), wait_ns=2000.0 * factor)
    assert baseline.num_steps(0) == MOST_STEPS
    found = baseline.expectation(0)
    assert found is not None
    assert np.median(found.busy_ns(shape) / busy(shape)) == pytest.approx(1.3, abs=0.03)
    assert baseline.wait_ns(0) == pytest.approx(2600, abs=20)
    assert baseline.wait_ns(7) is None
    assert baseline.expectation(7) is None
