"""The trials' own rules: what they draw can be done, and every way of being wrong is seen."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trial_plans import FACTORS, FAULTS, PLANS, SLOWING, Burners, World, plan_of
from trial_results import Trial, is_met, is_sample_met, read_results, table, write_results
from trial_rules import EXPECTED, account_errors, rule
from trial_runs import BURN, RUNNERS, burning, world_of
from trials import parse_kinds, parse_seeds

from insitu_collector.steps.change_point import MIN_BEFORE, PERSIST
from insitu_collector.verdicts.host import WINDOW_NS
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


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_a_kind_makes_must_be_said_and_nothing_else(kind: str) -> None:
    named = verdict(EXPECTED[kind], None)
    assert rule(answer([], [named]), 0.0, kind).right
    assert rule(answer([], [named], revised=1), 0.0, kind).missed == ["1 verdicts were withdrawn"]
    assert rule(answer([], [verdict("healthy", None)]), 0.0, kind).missed == [f"no {EXPECTED[kind]}"]
    assert rule(answer([], [named, verdict("stage_limits", 1)]), 0.0, kind).wrong
    contended = verdict("host_contended", None)
    assert rule(answer([], [named, contended]), 0.0, kind).right == (kind == "contended")
    assert rule(answer([], [named, contended]), 0.2, kind).right


def test_what_slows_all_stages_must_not_be_laid_to_one() -> None:
    both = [fault("slow_stage", rank, ms=4) for rank in (0, 1)]
    told = verdict("fail_slow", None)
    assert rule(answer(both, [told]), 0.0, "fail-slow").right
    assert rule(answer(both, [verdict("fail_slow", 0)]), 0.0, "fail-slow").wrong
    assert rule(answer(both, [told, verdict("stage_limits", 0)]), 0.0, "fail-slow").wrong
    early = verdict("fail_slow", None, detected_unix_ns=BEGAN - NS)
    assert rule(answer(both, [early]), 0.0, "fail-slow").missed == ["fail_slow was told before it was done"]


def test_contention_is_told_while_the_burners_burn() -> None:
    burnt = [{"kind": "burners", "stage": None, "rank": None, "unix_ns": BEGAN, "end_unix_ns": BEGAN + 8 * NS}]
    for after_s, said in ((3, []), (-1, ["host_contended was told before it was done"])):
        told = [verdict("host_contended", None, detected_unix_ns=BEGAN + after_s * NS)]
        assert rule(answer([], told), 0.0, "contended", burnt).missed == said
    goes_on = [{**told[0], "window_unix_ns": [BEGAN - 2 * NS, BEGAN + 5 * NS]}]
    assert rule(answer([], goes_on), 0.3, "contended", burnt).right, "others had begun it"
    assert not rule(answer([], goes_on), 0.0, "contended", burnt).right, "nobody else was there"
    over = [{**told[0], "window_unix_ns": [BEGAN - 2 * NS, BEGAN - NS]}]
    assert not rule(answer([], over), 0.3, "contended", burnt).right
    late = [verdict("host_contended", None, detected_unix_ns=BEGAN + 10 * NS)]
    assert rule(answer([], late), 0.0, "contended", burnt).missed == ["host_contended was told 2.0 s after it was over"]


@pytest.mark.parametrize("kind", EXPECTED)
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
    num_faults = {**dict.fromkeys(FAULTS, 2 - seed % 2), "fail-slow": WORLD.num_stages}
    assert len(faults) == num_faults.get(kind, 0)
    assert all(4 <= fault.start_s < plan.seconds - 5 for fault in faults), "healthy before, and time to see it"
    if kind in FAULTS and len(faults) == 2:
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


def test_a_sample_that_is_not_right_is_asked_twice_more_and_nothing_may_crash() -> None:
    trials = [Trial(kind, 2, [], right=True) for kind in ("gc", "nan", "kv", "prefill")]
    assert is_sample_met(trials)
    for doubt in (replace(trials[0], right=False, missed=["it"]), replace(trials[0], right=False, wrong=["it"])):
        assert not is_sample_met([doubt, *trials[1:]])
        assert is_sample_met([doubt, *trials[1:], Trial("gc", 3, [], right=True), Trial("gc", 4, [], right=True)])
        assert not is_sample_met([doubt, *trials[1:], Trial("gc", 3, [], right=True), replace(doubt, seed=4)])
    more = [Trial("gc", seed, [], right=True) for seed in (3, 4)]
    for crashed in (replace(trials[0], account=["2 + 2 = 5"]), replace(trials[0], failure="it fell over")):
        assert not is_sample_met([crashed, *trials[1:], *more])
    assert not is_sample_met([])


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


@pytest.mark.parametrize("world", [WORLD, None])
def test_an_unfinished_round_is_read_as_it_was_written(world: World | None, tmp_path: Path) -> None:
    trials = [Trial("gc", 1, ["gc=0@5"], right=True), Trial("none", 2, [], missed=["no verdict"], foreign_share=0.3)]
    path = tmp_path / "trials.json"
    assert read_results(path) == (None, [])
    write_results(path, world, trials)
    assert read_results(path) == (world, trials)


def test_no_demo_is_run_to_draw_from_where_none_is_asked_for(tmp_path: Path) -> None:
    assert world_of(["drops", "two-hosts"], None, tmp_path) is None
    assert world_of(["drops", "gc"], WORLD, tmp_path) is WORLD
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 200))
def test_all_stages_become_slower_by_one_share_with_time_before_and_after(seed: int) -> None:
    plan = plan_of("fail-slow", seed, WORLD)
    faults = [parse_fault(spec) for spec in plan.specs]
    assert [fault.stage for fault in faults] == [0, 1]
    shares = [(fault.ms or 0) / ms for fault, ms in zip(faults, WORLD.stage_ms, strict=True)]
    assert max(shares) - min(shares) < 0.01
    assert all(SLOWING[0] - 0.01 < share < SLOWING[1] + 0.01 for share in shares)
    assert {fault.start_s for fault in faults} == {faults[0].start_s}
    assert MIN_BEFORE + 1 < faults[0].start_s < plan.seconds - PERSIST - 2


@given(st.integers(1, 200))
def test_burners_burn_within_the_traffic_and_longer_than_a_look(seed: int) -> None:
    plan = plan_of("contended", seed, WORLD)
    assert plan.burners is not None
    assert 2 <= plan.burners.number <= 4
    assert plan.burners.end_s - plan.burners.start_s > WINDOW_NS / 1e9
    assert plan.burners.end_s < plan.seconds


def test_a_burner_uses_a_core_and_ends_by_itself() -> None:
    before_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-S", "-E", "-c", BURN, "0.0", "0.3"], check=True, timeout=60)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before_s > 0.05


def test_no_burner_outlives_its_context() -> None:
    before = set(psutil.Process().children())
    with burning(Burners(2, 30.0, 40.0)) as burnt:
        assert burnt["end_unix_ns"] - burnt["unix_ns"] == 10 * NS
        mine = set(psutil.Process().children()) - before
        assert len(mine) == 2
    assert not any(process.is_running() for process in mine)
