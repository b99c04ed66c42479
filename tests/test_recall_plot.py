"""The picture of recall by size: every kind with its figures and its detection limit, and what has no size in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recall_cases import KINDS
from recall_figures import Outcome
from recall_plot import FEWEST_TICKS, LIMIT, MOST_TICKS, interval, limits, plot, ticks


def outcome(kind: str, size: float, limit: float | None, *, found: bool = True) -> Outcome:
    return Outcome(kind, 0, size, limit, found, (), (), True)


def drawn(outcomes: list[Outcome], path: Path) -> str:
    plot(outcomes, path / "recall.svg")
    return (path / "recall.svg").read_text()


@given(num_found=st.integers(0, 200), more=st.integers(0, 200))
def test_an_interval_holds_its_share_and_is_never_a_point(num_found: int, more: int) -> None:
    num = max(1, num_found + more)
    low, high = interval(num_found / num, num)
    share = pytest.approx(num_found / num)
    assert low >= 0 and high <= 1 and high - low > 0.01
    assert (low == share or low < num_found / num) and (high == share or high > num_found / num)


def test_the_interval_of_nine_in_ten() -> None:
    """By the formula: (0.9 + 0.19) / 1.38 -+ 1.96 / 1.38 * sqrt(0.009 + 0.0096)."""
    assert interval(0.9, 10) == pytest.approx((0.596, 0.982), abs=0.001)


@pytest.mark.parametrize("name", KINDS)
def test_an_axis_has_some_sizes_written_at_it_all_inside(name: str) -> None:
    low, high = KINDS[name].sizes
    if low < high:
        found = ticks(low, high)
        assert FEWEST_TICKS <= len(found) <= MOST_TICKS and found == sorted(set(found))
        assert low * 0.99 <= found[0] and found[-1] <= high * 1.01


def test_sizes_at_an_axis_are_round_where_they_can_be() -> None:
    assert ticks(0.5, 30) == [0.5, 1, 2, 5, 10, 20]
    assert ticks(0.1, 500) == [0.1, 1, 10, 100]
    assert ticks(1.1, 2) == [1.1, 1.34, 1.64, 2]


def test_limits_are_those_of_the_cases_that_have_one() -> None:
    outcomes = [outcome("stage_limits", 3, limit) for limit in (1.5, None, 1.2)] + [outcome("stuck", 1_500, 3_200)]
    assert limits(outcomes, "stage_limits") == (1.2, 1.5)
    assert limits([outcome("stage_limits", 3, None)], "stage_limits") is None


def test_each_kind_has_a_panel_with_its_unit_its_figures_and_its_limit(tmp_path: Path) -> None:
    outcomes = [outcome("stuck", size, 3_200, found=size > 3_000) for size in (1_100, 2_500, 3_300, 6_000)]
    outcomes += [outcome("stage_limits", 3, 1.2), outcome("stage_limits", 9, 1.5, found=False)]
    outcomes += [outcome("records_dropped", 0.01, 0.0), outcome("first_nonfinite", 1, 0.0)]
    svg = drawn(outcomes, tmp_path)
    for text in (
        "limit 3,200: 2 of 2 told",
        "limit 1.2 to 1.5: 1 of 2 told",
        "limit any size: 1 of 1 told",
        "ms a step",
        "Faults without a size: first_nonfinite 1 of 1.",
    ):
        assert text in svg
    assert svg.count(f'stroke="{LIMIT}"') == 2, "a line where a limit begins, and none for any size"
    assert svg.count(f'fill="{LIMIT}"') == 3 + 1, "beside three panels' words a band where it varies"


def test_without_a_promise_no_limit_is_drawn(tmp_path: Path) -> None:
    svg = drawn([outcome("stuck", 1_500, None)], tmp_path)
    assert "limit none: 0 of 0 told" in svg and f'stroke="{LIMIT}"' not in svg
