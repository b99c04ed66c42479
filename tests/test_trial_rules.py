"""The trials' own rules: what they draw can be done, and every way of being wrong is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trial_plans import FACTORS, FAULTS, PLANS, World, plan_of
from trial_results import Trial, is_met, read_results, table, write_results
from trial_rules import SETTINGS, account_errors, rule
from trial_runs import RUNNERS
from trials import parse_kinds, parse_seeds

from insitu_engine.inject import check_faults, parse_fault

GOLDEN = json.loads((Path(__file__).parent / "golden/demo.json").read_text())
WORLD = World(num_stages=2, num_layers=8, stage_ms=(7.0, 9.0))
NS = 1_000_000_000
BEGAN = 1_700_000_005 * NS


def fault(kind: str, rank: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "stage": rank,
        "rank": rank,
        "layer": None,
        "step": None,
        "ms": None,
        "unix_ns": BEGAN,
    } | fields


def verdict(kind: str, rank: int | None, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {**GOLDEN["verdicts"][0], "kind": kind, "stage": rank, "rank": rank}
    return base | {"detected_unix_ns": BEGAN + 3 * NS} | fields


def answer(faults: list[dict[str, Any]], verdicts: list[dict[str, Any]], revised: int = 0) -> dict[str, Any]:
    document = {**GOLDEN, "verdicts": verdicts, "revised": revised, "fault": {"kind": "none"}}
    if faults:
        document["fault"] = faults[0]
    if len(faults) > 1:
        document["faults"] = faults
    return document


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_a_setting_makes_must_be_said_and_nothing_else(kind: str) -> None:
    named = verdict(SETTINGS[kind], None)
    assert rule(answer([], [named]), 0.0, kind).right
    assert rule(answer([], [verdict("healthy", None)]), 0.0, kind).missed == [f"no {SETTINGS[kind]}"]
    assert rule(answer([], [named, verdict("stage_limits", 1)]), 0.0, kind).wrong
    assert rule(answer([], [named, verdict("host_contended", None)]), 0.0, kind).wrong
    assert rule(answer([], [named, verdict("host_contended", None)]), 0.2, kind).right


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting_is_options_that_the_commands_have(kind: str) -> None:
    from insitu_engine.load import load
    from insitu_engine.serve import serve

    asked = plan_of(kind, 3, WORLD)
    assert asked == plan_of(kind, 3, WORLD)
    for command, text in ((serve, asked.serve), (load, asked.load)):
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in text.split() if word.startswith("--")} <= known


@given(st.sampled_from(list(PLANS)), st.integers(1, 200))
def test_what_is_drawn_can_be_done_in_the_time_there_is(kind: str, seed: int) -> None:
    plan = plan_of(kind, seed, WORLD)
    assert plan == plan_of(kind, seed, WORLD)
    faults = [parse_fault(spec) for spec in plan.specs]
    check_faults(faults, WORLD.num_stages, WORLD.num_layers)
    assert len(faults) == (2 - seed % 2 if kind in FAULTS else 0)
    assert all(4 <= fault.start_s < plan.seconds - 5 for fault in faults), "healthy before, and time to see it"
    if len(faults) == 2:
        assert faults[0].end_s is not None
        assert faults[0].end_s < faults[1].start_s
    for fault in faults:
        assert fault.kind != "hang" or (fault.ms or 0) >= 5000


def test_twenty_seeds_have_both_stages_and_every_factor() -> None:
    faults = [parse_fault(plan_of("slow-stage", seed, WORLD).specs[0]) for seed in range(1, 21)]
    assert {fault.stage for fault in faults} == {0, 1}
    drawn = {round((fault.ms or 0) / WORLD.stage_ms[fault.stage or 0], 1) for fault in faults}
    assert drawn == set(FACTORS)
    assert {parse_fault(plan_of("nan", seed, WORLD).specs[0]).layer for seed in range(1, 21)} > {0, 7}


SLOW = fault("slow_stage", 1, ms=25)
HANG = fault("hang", 0, step=900, ms=6000)
NAN = fault("nan", 1, layer=6, step=1200)
HEALTHY = verdict("healthy", None, text="nothing limits; a stage slower by 1.4 ms would have been seen")

RIGHT = [
    ([SLOW], [verdict("stage_limits", 1)]),
    ([HANG], [verdict("stuck", 0, text="rank 0 is stuck; rank 1 waits for it")]),
    ([NAN], [verdict("first_nonfinite", 1, layer=6, step=1200)]),
    ([fault("gc", 0, ms=180)], [verdict("gc_pause", 0), verdict("host_contended", None)]),
    ([], [HEALTHY]),
    ([SLOW, fault("slow_stage", 0, ms=9)], [verdict("stage_limits", 1), verdict("stage_limits", 0)]),
]
NOT_RIGHT = [
    ([SLOW], [HEALTHY], "no stage_limits"),
    ([SLOW], [verdict("stage_limits", 0)], "no stage_limits"),
    ([SLOW, fault("slow_stage", 0, ms=9)], [verdict("stage_limits", 1)], "at stage 0"),
    ([SLOW], [verdict("stage_limits", 1, detected_unix_ns=BEGAN - NS)], "before it was done"),
    ([NAN], [verdict("first_nonfinite", 1, layer=6, step=1201)], "no first_nonfinite"),
    ([HANG], [verdict("stuck", 0, text="rank 1 waits", detected_unix_ns=BEGAN + 7 * NS)], "1.0 s after the hang"),
    ([HANG], [verdict("stuck", 0, text="rank 0 is stuck")], "does not say who waits"),
    ([], [], "not healthy alone: no verdict"),
    ([], [verdict("inconclusive", None)], "not healthy alone"),
    ([], [verdict("healthy", None, text="all is well")], "without its limit"),
]
WRONG = [
    ([SLOW], [verdict("stage_limits", 1), verdict("stage_limits", 0)]),
    ([SLOW], [verdict("stage_limits", 1), verdict("stuck", 0)]),
    ([NAN], [verdict("first_nonfinite", 1, layer=6, step=1200), verdict("first_nonfinite", 1, layer=7, step=1201)]),
    ([], [HEALTHY, verdict("gc_pause", 1)]),
    ([], [verdict("stage_limits", None)]),
]


@pytest.mark.parametrize(("faults", "verdicts"), RIGHT)
def test_a_right_answer_is_right(faults: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    ruling = rule(answer(faults, verdicts), foreign_share=0.0)
    assert (ruling.right, ruling.wrong, ruling.missed) == (True, [], [])


@pytest.mark.parametrize(("faults", "verdicts", "said"), NOT_RIGHT)
def test_what_is_missing_is_said(faults: list[dict[str, Any]], verdicts: list[dict[str, Any]], said: str) -> None:
    ruling = rule(answer(faults, verdicts), foreign_share=0.0)
    assert not ruling.right
    assert any(said in missed for missed in ruling.missed), ruling.missed


@pytest.mark.parametrize(("faults", "verdicts"), WRONG)
def test_a_place_where_nothing_was_done_is_wrong(faults: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    assert rule(answer(faults, verdicts), foreign_share=0.0).wrong


def test_inconclusive_needs_contention_that_was_measured() -> None:
    unsure = answer([], [verdict("inconclusive", None), verdict("host_contended", None)])
    assert rule(unsure, foreign_share=0.2).right
    assert any("took only 1 %" in missed for missed in rule(unsure, foreign_share=0.01).missed)


def test_a_withdrawn_verdict_is_not_right() -> None:
    assert not rule(answer([SLOW], [verdict("stage_limits", 1)], revised=1), foreign_share=0.0).right


def test_the_record_must_add_up() -> None:
    whole = {**GOLDEN, "ledger": [{"stage": 0, "rank": 0, "class": "compute", "seconds": 30.0}]}
    assert account_errors(whole) == []
    lost = json.loads(json.dumps(whole))
    lost["records"]["tables"]["steps"]["stored"] -= 1
    assert account_errors(lost) == ["steps: 3600 produced, 3599 stored, 0 dropped"]
    dark = {**whole, "ledger": [{"stage": 0, "rank": 0, "class": "unrecorded", "seconds": 3.0}]}
    assert [error.partition(":")[0] for error in account_errors(dark)] == ["rank 0", "rank 0"]


def test_the_bar_is_nineteen_of_twenty_and_nothing_wrong() -> None:
    trials = [Trial("gc", seed, [], right=True) for seed in range(20)]
    assert is_met(trials)
    trials[0].right = False
    assert is_met(trials)
    trials[1].right = False
    assert not is_met(trials)
    trials[1].right, trials[1].wrong = True, ["stage_limits at stage 0"]
    assert not is_met(trials)
    assert "stage_limits at stage 0" in table(trials)


def test_only_a_miss_on_a_busy_host_is_asked_for_again() -> None:
    assert Trial("gc", 1, [], missed=["no gc_pause"], foreign_share=0.5).is_noisy
    assert not Trial("gc", 1, [], missed=["no gc_pause"], foreign_share=0.1).is_noisy
    assert not Trial("gc", 1, [], wrong=["stuck at stage 0"], foreign_share=0.5).is_noisy
    assert not Trial("gc", 1, [], right=True, foreign_share=0.5).is_noisy


def test_seeds_are_read_as_people_write_them() -> None:
    assert parse_seeds("1-3,7,9-9") == [1, 2, 3, 7, 9]
    with pytest.raises(click.BadParameter):
        parse_seeds("one")


def test_every_kind_has_a_runner_and_others_are_refused() -> None:
    assert set(PLANS) <= set(RUNNERS)
    assert parse_kinds("gc,hang") == ["gc", "hang"]
    with pytest.raises(click.BadParameter, match="no kind tea"):
        parse_kinds("gc,tea")


def test_an_unfinished_round_is_read_as_it_was_written(tmp_path: Path) -> None:
    trials = [Trial("gc", 1, ["gc=0@5"], right=True), Trial("none", 2, [], missed=["no verdict"], foreign_share=0.3)]
    path = tmp_path / "trials.json"
    assert read_results(path) == (None, [])
    write_results(path, WORLD, trials)
    assert read_results(path) == (WORLD, trials)
