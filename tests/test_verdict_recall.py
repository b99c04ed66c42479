"""The recall bench's own rules, and a seeded sample of its cases: nothing is said that is not so."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from recall_cases import KINDS, draw
from recall_figures import BAR, Outcome, by_size, figures, read, table, written
from verdict_recall import main, tried

from insitu.vocabulary import VerdictKind

ABOVE = {"kv_starved": 1, "prefill_delays_decode": 11, "expert_imbalance": 10}
"""Seeds of cases above the limit where what is drawn does not say so, or where the limit lies high in the range."""


def large(name: str) -> int:
    """Return the first seed whose fault is in the upper part of its range, or one that is known to be large."""
    low, high = KINDS[name].drawn or KINDS[name].sizes
    drawn = (seed for seed in range(1, 100) if _drawn(name, seed) >= low * (high / low) ** 0.7)
    return ABOVE.get(name) or next(drawn)


def _drawn(name: str, seed: int) -> float:
    return draw(name, seed).size


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_is_found_and_its_healthy_twin_is_left_alone(name: str) -> None:
    outcome = tried(name, large(name))
    assert outcome.above and outcome.found, outcome
    assert outcome.false == outcome.false_when_healthy == ()
    assert outcome.healthy


def test_every_kind_of_verdict_is_tried() -> None:
    """`healthy` and `inconclusive` are what twins are for."""
    assert {kind.verdict for kind in KINDS.values()} | {VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE} == set(
        VerdictKind
    )


@pytest.mark.parametrize("name", KINDS)
def test_cases_are_drawn_alike_from_their_seed_and_over_the_whole_range(name: str) -> None:
    assert draw(name, 7) == draw(name, 7)
    low, high = KINDS[name].drawn or KINDS[name].sizes
    sizes = [_drawn(name, seed) for seed in range(200)]
    assert all(low <= size <= high * 1.0001 for size in sizes)
    if high > low:
        assert min(sizes) < low * (high / low) ** 0.1 and max(sizes) > low * (high / low) ** 0.9
    case = draw(name, 7)
    assert case.healthy == replace(case.scenario, faults=())


def outcome(
    kind: str, *, seed: int = 0, size: float = 10.0, limit: float | None = 1.0, found: bool = True, false: str = ""
) -> Outcome:
    return Outcome(kind, seed, size, limit, found, (false,) if false else (), (), True)


def test_a_false_alarm_counts_against_the_kind_that_cried() -> None:
    tried_ones = [outcome("gc_pause"), outcome("stage_limits", false="gc_pause on rank 1")]
    gc, limits = figures(tried_ones)
    assert (gc.precision, gc.num_false, limits.precision) == (0.5, 1, 1.0)
    assert not gc.is_met and limits.is_met


def test_only_misses_above_the_limit_count_against_the_bar_and_without_any_case_above_it_is_not_met() -> None:
    below = outcome("stuck", limit=11.0, found=False)
    (found,) = figures([outcome("stuck"), below])
    assert found.recall_above == 1.0 and found.is_met
    (found,) = figures([outcome("stuck"), outcome("stuck", found=False)])
    assert found.recall_above == 0.5 < BAR and not found.is_met
    for nothing_promised in (below, outcome("stuck", limit=None)):
        (found,) = figures([nothing_promised])
        assert found.recall_above is None and not found.is_met


def test_recall_by_size_has_every_case_once() -> None:
    sizes = [0.4, 0.5, 0.6, 3.0, 29.0, 30.0, 31.0]
    outcomes = [outcome("stage_limits", size=size, found=size > 1) for size in sizes]
    buckets = list(by_size(outcomes, "stage_limits"))
    assert sum(n for _, _, n, _ in buckets) == len(sizes)
    assert [recall for *_, recall in buckets] == [0.0, 1.0, 1.0]
    assert "| `stage_limits` | ms a step | 0.5-0.989: 0.00 of 3;" in table(outcomes)


def test_outcomes_come_back_from_their_files_once_each_and_in_order(tmp_path: Path) -> None:
    outcomes = [outcome("gc_pause", seed=seed, false="stuck on rank 0" * (seed % 2)) for seed in (3, 1, 2)]
    (tmp_path / "a").write_text("".join(f"{written(one)}\n" for one in outcomes))
    (tmp_path / "b").write_text(f"{written(outcomes[0])}\n{written(outcome('stage_limits', limit=None))}\n")
    found = read([tmp_path / "a", tmp_path / "b"])
    assert found == [outcome("stage_limits", limit=None), *sorted(outcomes, key=lambda one: one.seed)]


def test_what_a_file_has_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A round in two parts is the round in one; read alone it runs nothing."""
    known, file = tried("site_never_fired", 1), tmp_path / "outcomes"
    file.write_text(f"{written(known)}\n")
    options = ["--kinds", "site_never_fired", "--seeds", "2", "--processes", "1", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["verdict_recall.py", *options])
    assert main() == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("1 cases and their healthy twins")
    assert [one.seed for one in read([file])] == [1, 2] and read([file])[0] == known
    monkeypatch.setattr(sys, "argv", ["verdict_recall.py", "--from", str(file)])
    assert main() == 0
    assert capsys.readouterr() == (printed.out, "")
