"""Two sides against each other: equal ones differ in nothing, a slower one is told by as much as it is slower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_collector.compare.comparison import Measured, compare
from insitu_collector.compare.fail_on import Outcome, outcome, parse_condition
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.times import StepTimes
from insitu_collector.values.summaries import Moments, SiteStatistics


def steps(seed: int, *, factor: float = 1.0, rows: tuple[int, int] = (1, 9), seconds: int = 20) -> StepTimes:
    """Return 50 steps a second whose time is 3 ms and 0.4 ms a row, with a heavy tail."""
    random = np.random.default_rng(seed)
    count = 50 * seconds
    num_rows = random.integers(*rows, count).astype(np.float64)
    shape = np.zeros((count, len(SHAPE)))
    shape[:, 0] = num_rows
    busy = factor * (3e6 + 4e5 * num_rows) * np.exp(random.normal(0.0, 0.05, count))
    busy += np.where(random.random(count) < 0.03, random.exponential(4e6, count), 0.0)
    t_ns = np.arange(count) * 20_000_000
    zeros = np.zeros(count)
    return StepTimes(t_ns, np.arange(count), busy, 0.9 * busy, zeros, shape, np.zeros(count, bool))


def side(seed: int, **changed: float) -> Measured:
    random = np.random.default_rng(seed)
    return Measured(
        label=f"side {seed}",
        stages={0: 0, 1: 1},
        times={0: steps(2 * seed), 1: steps(2 * seed + 1, **changed)},  # type: ignore[arg-type]
        tokens_per_s=100.0,
        ttft_s=random.exponential(0.1, 200),
        itl_s=random.normal(0.02, 0.002, 2_000),
        sites={
            "logits": SiteStatistics(Moments.of(random.normal(0, 1, 500)), Moments.of(random.normal(3, 1, 500)), 500)
        },
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1_000))
def test_two_runs_of_one_kind_differ_in_nothing(seed: int) -> None:
    found = compare(side(2 * seed), side(2 * seed + 1))
    assert [change.rank_a for change in found.steps] == [0, 1]
    for change in found.steps:
        assert change.ratio is not None and 0.97 < change.ratio.value < 1.03
    assert found.sites == () and found.num_sites == 1
    assert found.doubts == ()


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.3, 4.0))
def test_a_slower_stage_is_told_by_its_factor(factor: float) -> None:
    found = compare(side(1), side(2, factor=factor))
    ratio = found.steps[1].ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(factor, rel=0.04)
    assert ratio.low <= ratio.value <= ratio.high
    assert found.steps[1].core_ratio is not None
    assert found.steps[1].core_ratio.value == pytest.approx(factor, rel=0.04)


def test_larger_batches_are_not_slower_steps() -> None:
    found = compare(side(1), side(2, rows=(9, 17)))  # type: ignore[arg-type]
    change = found.steps[1]
    assert change.b_ms > 1.4 * change.a_ms
    assert change.ratio is not None and change.ratio.value == pytest.approx(1.0, abs=0.05)


def test_a_few_steps_give_no_ratio_and_a_doubt() -> None:
    few = replace(side(1), times={0: steps(1), 1: steps(2, seconds=2)})
    found = compare(side(3), few)
    assert found.steps[1].ratio is None
    assert any("rank 1" in doubt for doubt in found.doubts)
    assert outcome(parse_condition("step-time>1.2"), found) is Outcome.UNDECIDED


def test_grids_that_differ_are_said_and_common_ranks_compared() -> None:
    other = replace(side(2), stages={0: 0, 1: 0, 2: 1})
    found = compare(side(1), other)
    assert [change.rank_a for change in found.steps] == [0]
    assert "2 stages, 2 ranks in A, 2 stages, 3 ranks in B" in found.doubts[0]


def test_values_that_moved_and_values_that_became_bad_are_told() -> None:
    a = side(1)
    moved = SiteStatistics(Moments.of(np.random.default_rng(5).normal(2, 1, 500)), a.sites["logits"].absmax, 500, 3)
    found = compare(a, replace(side(2), sites={"logits": moved}))
    assert {change.figure for change in found.sites} == {"row_sum", "nonfinite"}
    assert outcome(parse_condition("site-shift>1"), found) is Outcome.FAILED


def test_verdicts_gained_and_lost() -> None:
    a = replace(side(1), alarms=frozenset({("gc_pause", 0, 0)}))
    b = replace(side(2), alarms=frozenset({("stage_limits", 1, 1)}))
    found = compare(a, b)
    assert (found.gained, found.lost) == ((("stage_limits", 1, 1),), (("gc_pause", 0, 0),))
    assert outcome(parse_condition("verdicts"), found) is Outcome.FAILED
    assert outcome(parse_condition("verdicts"), compare(b, b)) is Outcome.HELD


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("step-time>1.2", Outcome.FAILED), ("step-time>1.8", Outcome.HELD), ("step-time>1.5", Outcome.UNDECIDED)],
)
def test_a_condition_fails_only_where_the_whole_interval_is_beyond_it(condition: str, expected: Outcome) -> None:
    assert outcome(parse_condition(condition), compare(side(1), side(2, factor=1.5))) is expected


@pytest.mark.parametrize("text", ["step-time", "step-time>", "step-time>x", "speed>1", "verdicts>1", "ttft-p95<1", ""])
def test_anything_else_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="it may be verdicts, step-time>RATIO"):
        parse_condition(text)
