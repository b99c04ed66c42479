"""Verdict `fail_slow`: who became slower and stays so, at equal shape; no load, no hiccup, nothing told elsewhere."""

from __future__ import annotations

import re

import pytest
from grid_kit import Grid, judged, named, stands

from insitu.vocabulary import VerdictKind
from insitu_collector.verdicts.finding import standing


def slower(ranks: set[int], ms: float, begin_s: float, end_s: float = 1e9, *, on_cpu: bool = True) -> Grid:
    """Two stages of one rank each, 10 ms a step or so, of which some take so many ms more in between."""

    def extra(rank: int, at_s: float) -> tuple[float, float]:
        more = ms if rank in ranks and begin_s <= at_s < end_s else 0.0
        return (0.0, more) if on_cpu else (more, 0.0)

    return Grid(2, 1, seconds=60.0, base_ms=8.0, extra=extra)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_host_that_slows_all_its_ranks_is_told_as_one(on_cpu: bool) -> None:
    told = judged(slower({0, 1}, 4.0, 30.0, on_cpu=on_cpu))
    (found,) = standing(told)
    assert (found.kind, found.on_rank, found.state) == (VerdictKind.FAIL_SLOW, None, "open")
    factors = re.findall(r"rank \d (\d\.\d\d)x", found.text)
    assert [float(factor) for factor in factors] == pytest.approx([1.4, 1.4], abs=0.06)
    first = next(verdict for verdict in told if verdict.kind is VerdictKind.FAIL_SLOW)
    assert 15 <= (first.detected_unix_ns - first.window_start_unix_ns) / 1e9 < 23
    assert "all ranks of one host became slower together" in found.text
    assert "Told from 1.25x on, after 15 s" in found.text


def test_a_rank_that_is_slower_by_less_than_its_stage_would_be_told_for() -> None:
    told = judged(slower({1}, 2.7, 30.0))
    (found,) = standing(told)
    assert (found.kind, found.on_rank, found.on_stage) == (VerdictKind.FAIL_SLOW, 1, 1)
    assert "non-communication slow" in found.text


def test_it_is_over_when_the_speed_is_back() -> None:
    (found,) = stands(slower({0, 1}, 5.0, 22.0, 42.0))
    assert (found.kind, found.state) == (VerdictKind.FAIL_SLOW, "closed")


@pytest.mark.parametrize("grid", [slower({0, 1}, 5.0, 30.0, 40.0), slower({0, 1}, 1.2, 30.0), slower(set(), 0, 0)])
def test_what_goes_again_and_what_is_small_leave_it_healthy(grid: Grid) -> None:
    assert named(grid) == [("healthy", None)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 2), (7, 8)),
        pytest.param((7, 8), (1, 2), marks=pytest.mark.matrix),
        pytest.param((1, 4), (3, 8), marks=pytest.mark.matrix),
    ],
)
def test_larger_batches_are_no_slowdown(first: tuple[int, int], second: tuple[int, int]) -> None:
    """From one to two requests a step to seven or eight: a quarter longer, and as long as that should take."""
    grid = Grid(2, 1, seconds=60.0, base_ms=8.0, num_requests=lambda at_s: second if at_s > 30 else first)
    assert named(grid) == [("healthy", None)]


def test_a_batch_size_that_costs_more_than_the_fit_knows_is_no_slowdown() -> None:
    """From seven requests on another kernel runs, half as long again: no straight line through all sizes shows it."""
    grid = Grid(
        2,
        1,
        seconds=60.0,
        base_ms=8.0,
        size_ms=lambda size: 0.4 * size + 5.0 * (size > 6),
        num_requests=lambda at_s: (7, 8) if at_s > 30 else (1, 6),
    )
    assert "fail_slow" not in {kind for kind, _ in named(grid)}


@pytest.mark.parametrize(("ms", "told"), [(3.4, False), (9.0, True)])
def test_where_the_load_changed_too_more_is_asked_for(ms: float, told: bool) -> None:
    """Steps that come seldom find caches cold."""
    grid = slower({0, 1}, ms, 30.0)
    grid.gap_ms = lambda at_s: 60.0 if at_s > 30 else 0.0
    assert (("fail_slow", None) in named(grid)) is told


def test_a_slow_stage_is_not_told_twice() -> None:
    assert named(slower({1}, 9.0, 30.0)) == [("stage_limits", 1)]


@pytest.mark.parametrize(("ms", "said"), [(4.0, "healthy"), (14.0, "host_contended")])
def test_waiting_for_a_core_is_not_a_slowdown(ms: float, said: str) -> None:
    grid = Grid(2, 1, seconds=60.0, base_ms=8.0, queued={0: ms, 1: ms}, queued_from_s=30.0, host_busy=1.5)
    assert named(grid) == [(said, None)]


def test_a_run_of_one_rank_without_a_baseline_is_compared_with_its_own_first_seconds() -> None:
    def extra(rank: int, at_s: float) -> tuple[float, float]:
        return 0.0, 4.0 if at_s > 40 else 0.0

    grid = Grid(1, 1, seconds=70.0, base_ms=8.0, extra=extra, warmup=0)
    assert named(grid) == [("fail_slow", 0)]
