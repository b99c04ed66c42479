"""Verdict `straggler_rank`: who comes late to the collectives of its stage is named, and nobody else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from grid_kit import Grid, judged, named, seeds, stands
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import VerdictKind
from insitu_collector.verdicts.finding import standing
from insitu_collector.verdicts.straggler_rank import running_mean

QUIET = {"healthy", "inconclusive"}


@pytest.mark.parametrize("seed", seeds(4))
@pytest.mark.parametrize(("num_stages", "num_peers"), [(1, 2), (1, 4), (2, 2)])
def test_a_healthy_group_has_no_straggler(num_stages: int, num_peers: int, seed: int) -> None:
    found = named(Grid(num_stages, num_peers, noise=0.15, seed=seed))
    assert {kind for kind, _ in found} == ({"healthy"} if num_stages > 1 else {"inconclusive"})


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize(("num_stages", "num_peers", "rank"), [(1, 2, 1), (1, 4, 2), (2, 2, 0), (2, 3, 5)])
def test_the_late_rank_is_named_with_why_and_what_it_costs(
    num_stages: int, num_peers: int, rank: int, on_cpu: bool
) -> None:
    def extra(at: int, at_s: float) -> tuple[float, float]:
        ms = 5.0 if at == rank and at_s > 3 else 0.0
        return (0.0, ms) if on_cpu else (ms, 0.0)

    told = judged(Grid(num_stages, num_peers, extra=extra))
    (found,) = standing(told)
    assert (found.kind, found.on_rank, found.on_stage) == (VerdictKind.STRAGGLER_RANK, rank, rank // num_peers)
    late = re.search(r"comes (\d+\.\d) ms a step later", found.text)
    assert late is not None
    assert float(late[1]) == pytest.approx(5.0, rel=0.25)
    assert ("on the CPU" in found.text) is on_cpu
    assert "non-communication slow" in found.text
    gain = re.search(r"would take (\d+\.\d) ms instead of (\d+\.\d) ms", found.text)
    assert gain is not None
    assert float(gain[2]) - float(gain[1]) == pytest.approx(5.0, rel=0.3)
    assert found.num_requests == 8
    assert (found.detected_unix_ns - found.window_start_unix_ns) / 1e9 < 5.0


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("at_s", [3.0, 3.3, 3.7])
def test_the_cause_is_that_of_the_late_steps_from_the_first_look_on(at_s: float, on_cpu: bool) -> None:
    """Half of a first window are steps from before: shorter ones, so there are more of them."""

    def extra(rank: int, now_s: float) -> tuple[float, float]:
        ms = 5.0 if rank == 1 and now_s > at_s else 0.0
        return (0.0, ms) if on_cpu else (ms, 0.0)

    told = [verdict for verdict in judged(Grid(1, 2, extra=extra)) if verdict.kind is VerdictKind.STRAGGLER_RANK]
    said = "; computing: " if on_cpu else "; kept from computing: "
    assert told
    assert all(said in verdict.text for verdict in told)
    gain = re.search(r"would take (\d+\.\d) ms instead of (\d+\.\d) ms", told[0].text)
    assert gain is not None
    assert float(gain[2]) - float(gain[1]) == pytest.approx(5.0, rel=0.1)


def test_what_all_ranks_of_a_stage_share_limits_the_stage_and_makes_no_straggler() -> None:
    def extra(rank: int, at_s: float) -> tuple[float, float]:
        return (6.0 if rank in (2, 3) and at_s > 4 else 0.0), 0.0

    (found,) = stands(Grid(2, 2, extra=extra))
    assert (found.kind, found.on_stage, found.on_rank) == (VerdictKind.STAGE_LIMITS, 1, 2)
    assert "keeps its ranks 2, 3 alike busy 6.0 ms longer" in found.text
    assert "+41 % throughput" in found.text or "throughput" in found.text


def test_late_beyond_what_the_stage_shares_is_both() -> None:
    def extra(rank: int, at_s: float) -> tuple[float, float]:
        late = at_s > 4
        return 6.0 * (rank in (2, 3) and late) + 6.0 * (rank == 3 and late), 0.0

    assert named(Grid(2, 2, extra=extra)) == [("stage_limits", 2), ("straggler_rank", 3)]


def test_two_late_ranks_of_four_are_named_and_gain_nothing_alone() -> None:
    def extra(rank: int, at_s: float) -> tuple[float, float]:
        return (6.0 if rank in (1, 3) and at_s > 3 else 0.0), 0.0

    found = stands(Grid(1, 4, noise=0.02, extra=extra))
    assert [verdict.on_rank for verdict in found] == [1, 3]
    assert all("another rank is as late" in verdict.text for verdict in found)


def test_a_late_input_is_laid_to_communication() -> None:
    (found,) = stands(Grid(2, 2, slow_input={3: 5.0}))
    assert (found.kind, found.on_rank) == (VerdictKind.STRAGGLER_RANK, 3)
    assert "(communication slow); its input takes 5.0 ms longer to come" in found.text


def test_waiting_for_a_core_is_contention_and_no_straggler() -> None:
    found = named(Grid(1, 2, queued={1: 4.0}, host_busy=2.5))
    assert "straggler_rank" not in {kind for kind, _ in found}
    assert ("host_contended", None) in found


def test_a_speed_that_wanders_for_a_second_is_no_straggler() -> None:
    """As seen on virtual cores: the CPU time of a 4 ms step wandered between 3.4 and 5.0 ms on one rank only."""

    def extra(rank: int, at_s: float) -> tuple[float, float]:
        return 0.0, (1.3 if rank == 1 and int(at_s / 1.5) % 2 else 0.0)

    assert {kind for kind, _ in named(Grid(1, 2, base_ms=3.0, extra=extra))} <= QUIET


@pytest.mark.parametrize(("ms", "told"), [(0.7, False), (1.0, False), (4.5, True)])
def test_the_least_lateness_that_is_told(ms: float, told: bool) -> None:
    def extra(rank: int, _at_s: float) -> tuple[float, float]:
        return ms if rank == 1 else 0.0, 0.0

    assert (named(Grid(1, 2, extra=extra)) == [("straggler_rank", 1)]) is told


@pytest.mark.parametrize("on_cpu", [False, True])
def test_more_is_asked_for_where_the_rank_computes_longer(on_cpu: bool) -> None:
    """A quarter of a step: between what is told off the core and on it."""

    def extra(rank: int, _at_s: float) -> tuple[float, float]:
        ms = 2.1 if rank == 1 else 0.0
        return (0.0, ms) if on_cpu else (ms, 0.0)

    found = named(Grid(1, 2, noise=0.01, extra=extra))
    assert found == ([("inconclusive", None)] if on_cpu else [("straggler_rank", 1)])


def test_it_is_over_once_the_rank_is_on_time_again() -> None:
    def extra(rank: int, at_s: float) -> tuple[float, float]:
        return (6.0 if rank == 1 and 2 < at_s < 8 else 0.0), 0.0

    (found,) = stands(Grid(1, 2, seconds=18.0, extra=extra))
    assert (found.kind, found.on_rank, found.state) == (VerdictKind.STRAGGLER_RANK, 1, "closed")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200))
def test_the_running_mean_stays_within_its_values_and_starts_without_bias(values: list[float]) -> None:
    found = running_mean(np.array(values))
    assert found[0] == pytest.approx(values[0])
    assert found.min() >= min(values) - 1e-3
    assert found.max() <= max(values) + 1e-3
