"""When `healthy` can be said: where the detection limit is no larger than what it is worth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.evidence import Evidence
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.slow_stage import StageExcess
from insitu_collector.verdicts.healthy import healthy

MS = 1e6
TIMES = st.floats(0.0, 3 * MS)  # around the least excess that is told


def stage(number: int, expected_ns: float, threshold_ns: float, *, learnt: bool = True) -> StageExcess:
    return StageExcess(
        rank=number,
        stage=number,
        t0_ns=0,
        t1_ns=3_000_000_000,
        num_steps=100,
        busy_ns=expected_ns,
        expected_ns=expected_ns,
        cpu_excess_ns=0.0,
        off_excess_ns=0.0,
        own_ns=0.0,
        threshold_ns=threshold_ns,
        wait_ns=0.0,
        agrees=False,
        tiles=(),
        learnt=learnt,
    )


def said(*stages: StageExcess) -> str | None:
    found = healthy(Evidence(), Baseline(), {each.rank: each for each in stages}, 0)
    return found.text if found else None


@given(st.lists(st.tuples(TIMES, TIMES), min_size=2, max_size=4))
def test_nothing_is_healthy_where_more_than_its_own_time_and_a_millisecond_would_go_unseen(
    times: list[tuple[float, float]],
) -> None:
    blunt = any(threshold > expected and threshold > MS for expected, threshold in times)
    found = said(*(stage(number, *each) for number, each in enumerate(times)))
    assert (found is None) == blunt
    for number, (_, threshold) in enumerate(times if found else []):
        assert f"stage {number} by {threshold / MS:.1f} ms (" in (found or "")


def test_a_short_stage_s_time_is_told_with_two_digits() -> None:
    assert "stage 0 by 1.0 ms (6.00x its 0.20 ms), stage 1 by 1.0 ms (1.20x its 5.0 ms)" in (
        said(stage(0, 0.2 * MS, MS), stage(1, 5 * MS, MS)) or ""
    )


def test_without_a_baseline_it_says_what_is_compared() -> None:
    assert "no warm-up was recorded" in (said(*(stage(n, 0.2 * MS, 5 * MS, learnt=False) for n in (0, 1))) or "")
