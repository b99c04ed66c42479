"""Page's cumulative sum: its error rates are those that are stated, and a rise is found where it began."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from insitu_collector.steps.change_point import (
    DRIFT,
    LEAST_DEVIATIONS,
    MIN_BEFORE,
    PERSIST,
    THRESHOLD,
    cumulative_sum,
    latest_change,
    mean_time_to_alarm,
)

LEAST = 0.25


def wandering(seed: int, num: int, *, deviation: float = 0.1, memory: float = 0.7) -> NDArray[np.float64]:
    """Seconds that remember each other, as the speed of a virtual core does."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, deviation * np.sqrt(1 - memory**2), num)
    found = np.zeros(num)
    for at in range(1, num):
        found[at] = memory * found[at - 1] + noise[at]
    return found


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(-1, 1), st.floats(0, 1))
def test_the_closed_form_is_pages_recursion(values: list[float], level: float, drift: float) -> None:
    total, expected = 0.0, []
    for value in values:
        total = max(0.0, total + value - level - drift)
        expected.append(total)
    np.testing.assert_allclose(cumulative_sum(np.array(values), level, drift), expected, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_the_mean_time_to_an_alarm_is_siegmunds(shift: float) -> None:
    random = np.random.default_rng(int(shift))
    drift = DRIFT * LEAST_DEVIATIONS
    taken = []
    for _ in range(400):
        total = cumulative_sum(random.normal(shift, 1.0, 3000), 0.0, drift)
        taken.append(int(np.argmax(total > THRESHOLD)) + 1)
    assert np.mean(taken) == pytest.approx(mean_time_to_alarm(shift), rel=0.15)


def test_a_false_alarm_is_expected_once_in_months_of_independent_seconds() -> None:
    assert mean_time_to_alarm(0.0) > 200 * 86_400
    assert mean_time_to_alarm(LEAST_DEVIATIONS) < 5.5


def test_a_core_that_wanders_by_a_fifth_never_slows_for_good() -> None:
    """Ten minutes each; looked at every second, as the judge does."""
    for seed in range(20):
        values = wandering(seed, 600)
        for now in range(MIN_BEFORE, 600, 3):
            found = latest_change(values[:now], LEAST)
            assert found is None or not found.stays, (seed, now)


@pytest.mark.parametrize("shift", [0.35, 0.6, 3.0])
@pytest.mark.parametrize("before", [25, 100, 400])
def test_a_rise_that_stays_is_told_after_fifteen_seconds_from_where_it_began(before: int, shift: float) -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        values = random.normal(0, 0.04, before + 40)
        values[before:] += shift
        told = [now for now in range(before, len(values)) if (f := latest_change(values[:now], LEAST)) and f.stays]
        assert told[0] - before == pytest.approx(PERSIST, abs=3)
        found = latest_change(values[: told[0]], LEAST)
        assert found is not None
        assert found.begin == pytest.approx(before, abs=2)
        assert found.shift == pytest.approx(shift, abs=0.05)


def test_a_rise_that_lasts_is_no_part_of_what_was_before() -> None:
    """Seconds of a real rank on a core whose speed varied: the longer the rise, the larger it had to be."""
    before = [
        -0.15,
        -0.12,
        -0.09,
        -0.15,
        0.22,
        0.21,
        0.11,
        0.32,
        0.38,
        0.31,
        -0.03,
        -0.09,
        0.26,
        0.11,
        0.05,
        0.09,
        0.23,
    ]
    after = [0.88, 0.71, 0.73, 0.9, 0.78, 0.79, 0.69, 0.68, 0.77, 0.83, 0.65, 0.72, 0.82, 0.76, 0.75, 0.7, 0.82, 0.82]
    series = np.array([*before, 0.24, -0.09, -0.07, -0.17, -0.32, 0.18, *after])
    found = [latest_change(series[:now], LEAST) for now in range(23 + PERSIST, len(series) + 1)]
    assert all(change is not None and change.stays and change.begin == 23 for change in found)
    assert len({change.least for change in found if change}) == 1


def test_a_blip_just_before_a_rise_is_not_where_it_began() -> None:
    """Seconds of a real rank: two were a little slow before the host became slow for good."""
    before = [0.0, -0.01, 0.0, -0.2, -0.02, 0.06, -0.02, -0.07, 0.1, 0.06, 0.0, -0.07, 0.03, 0.22, -0.07, -0.02, 0.03]
    series = np.array([*before, -0.16, -0.09, 0.25, 0.26, 0.07, *[1.7, 1.8, 1.5, 1.4] * 4])
    change = latest_change(series, LEAST)
    assert change is not None and change.stays
    assert change.begin == len(series) - 16


def test_one_that_goes_again_and_one_that_is_small_are_not_told() -> None:
    values = np.random.default_rng(1).normal(0, 0.04, 120)
    hiccup, small = values.copy(), values.copy()
    hiccup[60:70] += 3.0
    small[60:] += 0.2
    for series in (hiccup, small):
        found = [latest_change(series[:now], LEAST) for now in range(25, 120)]
        assert not any(change is not None and change.stays for change in found)
    assert latest_change(hiccup[:100], LEAST) is None, "a hiccup must not hold up what follows"


@given(st.floats(0.5, 4.0), st.integers(0, 50))
def test_what_varies_more_must_shift_more(scale: float, seed: int) -> None:
    """Twice the spread and twice the shift are the same finding, in twice the unit."""
    values = np.random.default_rng(seed).normal(0, 0.1, 80)
    values[50:] += 2.0
    one, other = latest_change(values, 0.0), latest_change(scale * values, 0.0)
    assert one is not None
    assert other is not None
    assert (other.begin, other.stays) == (one.begin, one.stays)
    assert other.least == pytest.approx(scale * one.least)
    assert other.shift == pytest.approx(scale * one.shift)
