"""The recall bench's own rules, and a seeded sample of its cases: nothing is said that is not so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from recall_cases import KINDS, draw
from verdict_recall import BAR, Outcome, by_size, figures, plot, table, tried

SAMPLE = [name for name in KINDS if name != "prefill_delays_decode"]
"""The kinds that say from which size of the fault on they must be said, and memory, which is short in every case."""


def large(name: str) -> int:
    """Return the first seed whose fault is in the upper part of its range."""
    low, high = KINDS[name].sizes
    return next(seed for seed in range(1, 100) if draw(name, seed).size >= low * (high / low) ** 0.7)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_is_found_and_its_healthy_twin_is_left_alone(name: str) -> None:
    outcome = tried(name, large(name) if name != "kv_starved" else 1)
    assert outcome.found, outcome
    assert outcome.false == outcome.false_when_healthy == ()


@pytest.mark.parametrize("name", KINDS)
def test_cases_are_drawn_alike_from_their_seed_and_over_the_whole_range(name: str) -> None:
    assert draw(name, 7) == draw(name, 7)
    low, high = KINDS[name].sizes
    sizes = [draw(name, seed).size for seed in range(200)]
    assert all(low <= size <= high * 1.0001 for size in sizes)
    if high > low:
        assert min(sizes) < low * (high / low) ** 0.1 and max(sizes) > low * (high / low) ** 0.9
    case = draw(name, 7)
    assert case.healthy == replace(case.scenario, faults=())


def outcome(kind: str, *, size: float = 10.0, above: bool = True, found: bool = True, false: str = "") -> Outcome:
    return Outcome(kind, 0, size, above, found, (false,) if false else (), ())


def test_a_false_alarm_counts_against_the_kind_that_cried() -> None:
    tried_ones = [outcome("gc_pause"), outcome("stage_limits", false="gc_pause on rank 1")]
    gc, limits = figures(tried_ones)
    assert (gc.precision, gc.num_false, limits.precision) == (0.5, 1, 1.0)
    assert not gc.is_met and limits.is_met


def test_only_misses_above_the_limit_count_against_the_bar() -> None:
    (found,) = figures([outcome("stuck"), outcome("stuck", above=False, found=False)])
    assert found.recall_above == 1.0 and found.is_met
    (found,) = figures([outcome("stuck"), outcome("stuck", found=False)])
    assert found.recall_above == 0.5 < BAR and not found.is_met


def test_recall_by_size_has_every_case_once(tmp_path: Path) -> None:
    sizes = [0.5, 0.6, 3.0, 29.0, 30.0]
    outcomes = [outcome("stage_limits", size=size, found=size > 1) for size in sizes]
    buckets = list(by_size(outcomes, "stage_limits"))
    assert sum(n for _, _, n, _ in buckets) == len(sizes)
    assert [recall for *_, recall in buckets] == [0.0, 1.0, 1.0]
    assert "| `stage_limits` | ms a step | 0.5-0.989: 0.00 of 2;" in table(outcomes)
    plot(outcomes, tmp_path / "recall.svg")
    assert (tmp_path / "recall.svg").read_text().startswith("<svg")
