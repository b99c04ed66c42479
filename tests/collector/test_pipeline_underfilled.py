"""Verdict `pipeline_underfilled`: told where more in flight would gain and requests are there, and nowhere else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from grid_kit import seeds
from judged_kit import every_revision

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate
from insitu_collector.steps.times import StepTimes, step_times
from insitu_collector.verdicts.finding import Verdict, standing
from insitu_collector.verdicts.pipeline_underfilled import look, measure
from insitu_collector.whatif.graph import record
from insitu_collector.whatif.predict import tokens_per_s

UNDERFILLED = Scenario(seed=1, seconds=15.0, base_ms=(9.0, 10.0), in_flight=1, requests_per_s=20.0)


def judged(scenario: Scenario) -> list[Verdict]:
    return every_revision(simulate(scenario))


def taken(scenario: Scenario) -> tuple[Evidence, dict[int, StepTimes]]:
    evidence = Evidence()
    evidence.add(simulate(scenario))
    return evidence, {rank: steps.only(~steps.warmup) for rank, steps in step_times(evidence, 0).items()}


@pytest.mark.parametrize("seed", seeds(3))
def test_one_in_flight_for_two_stages_is_told_with_floor_gain_and_remedy(seed: int) -> None:
    (found,) = standing(judged(replace(UNDERFILLED, seed=seed)))
    assert found.kind is VerdictKind.PIPELINE_UNDERFILLED
    assert found.text.startswith("the pipeline is underfilled: 1.0 micro-batches are in flight for 2 stages")
    assert "with 1 in flight 50 % is the least" in found.text
    assert "--in-flight 2" in found.remedy
    assert (found.on_rank, found.on_stage, found.confidence > 0.8) == (None, None, True)
    assert found.num_requests > 5


def test_the_gain_that_is_told_comes_true() -> None:
    """More wait than one micro-batch of eight can take in; another one takes eight of them."""
    (found,) = standing(judged(UNDERFILLED))
    said = re.search(r"would get \+(\d+) % throughput", found.text)
    assert said is not None
    measured = []
    for scenario in (UNDERFILLED, replace(UNDERFILLED, in_flight=2)):
        evidence, _ = taken(scenario)
        assert evidence.traffic_ns is not None
        graph = record(evidence, evidence.traffic_ns[0] + 3 * SECOND, evidence.traffic_ns[1])
        assert graph is not None
        measured.append(tokens_per_s(graph))
    assert 1 + float(said[1]) / 100 == pytest.approx(measured[1] / measured[0], rel=0.1)


def test_two_in_flight_for_three_stages_is_told() -> None:
    scenario = replace(UNDERFILLED, base_ms=(9.0, 9.0, 9.0), in_flight=2, requests_per_s=30.0)
    (found,) = standing(judged(scenario))
    assert found.kind is VerdictKind.PIPELINE_UNDERFILLED
    assert "with 2 in flight 50 % is the least" in found.text


@pytest.mark.parametrize(
    "changes",
    [
        {"requests_per_s": 0.8},  # too little demand: seldom two at once
        {"in_flight": 2},  # as many as stages
        {"in_flight": 2, "requests_per_s": 0.8},
        {"in_flight": 3},
        {"base_ms": (1.0, 20.0)},  # the last stage never waits for long: more in flight would gain nothing
        {"seconds": 8.0},  # not long enough
    ],
)
@pytest.mark.parametrize("seed", seeds(2))
def test_nothing_is_said_of_a_pipeline_that_is_not_underfilled(seed: int, changes: dict[str, float]) -> None:
    told = judged(replace(UNDERFILLED, seed=seed, **changes))  # type: ignore[arg-type]
    assert VerdictKind.PIPELINE_UNDERFILLED not in {verdict.kind for verdict in told}


def test_a_fault_is_told_and_not_what_it_makes_of_the_filling() -> None:
    told = judged(replace(UNDERFILLED, faults=(Fault("slow", 5.0, 1, ms=20.0),)))
    (found,) = standing(told)
    assert found.kind is VerdictKind.STAGE_LIMITS


def test_where_larger_batches_outweigh_the_bubble_nothing_is_said() -> None:
    """None wait, and steps of eight requests cost nearly what those of four do: twice as many gain nothing."""
    few = judged(replace(UNDERFILLED, requests_per_s=3.0, seconds=20.0))
    assert VerdictKind.PIPELINE_UNDERFILLED not in {verdict.kind for verdict in few}


@pytest.mark.parametrize(("seed", "per_s"), [(6, 4.1), (7, 5.6)])
def test_where_nobody_waits_for_a_place_nothing_is_promised(seed: int, per_s: float) -> None:
    """Three or four run at once, now more and now fewer: those that are open at one moment are not who waits."""
    scenario = Scenario(seed=seed, seconds=15.0, base_ms=(5.0, 5.5, 6.0), in_flight=2, requests_per_s=per_s)
    told = judged(scenario)
    assert {verdict.kind for verdict in told} == {VerdictKind.HEALTHY}


def test_without_a_step_graph_there_is_no_gain_to_promise_and_nothing_is_said() -> None:
    evidence, times = taken(UNDERFILLED)
    filling = measure(evidence, times, 2)
    assert filling is not None
    assert (filling.num_slots, filling.demand > 0.8, filling.waiting > 0.3) == (1, True, True)
    assert filling.in_flight == pytest.approx(1.0, abs=0.05)
    assert look(evidence, times, None) == []


def test_steps_that_do_not_say_their_slot_are_no_measure() -> None:
    tables = simulate(UNDERFILLED)
    at = tables["steps"].schema.get_field_index("mb")
    unknown = tables["steps"].drop_columns(["mb"]).add_column(at, "mb", [[None] * tables["steps"].num_rows])
    evidence = Evidence()
    evidence.add({**tables, "steps": unknown.cast(tables["steps"].schema)})
    times = {rank: steps.only(~steps.warmup) for rank, steps in step_times(evidence, 0).items()}
    assert measure(evidence, times, 2) is None


def test_in_flight_is_counted_from_the_first_rank_to_the_last() -> None:
    for in_flight, scenario in ((2, replace(UNDERFILLED, in_flight=2)), (3, replace(UNDERFILLED, in_flight=3))):
        evidence, times = taken(scenario)
        filling = measure(evidence, times, 2)
        assert filling is not None
        assert in_flight - 0.5 <= filling.in_flight <= in_flight
