"""What a change would do: asked for in words, predicted by replay, and true of simulated pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_collector.evidence import Evidence
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate
from insitu_collector.whatif.changes import Change, NoPrediction, Speed, parse_changes
from insitu_collector.whatif.predict import Prediction, WhatIf, tokens_per_s
from insitu_collector.whatif.report import what_if

SATURATED = Scenario(seed=3, seconds=8.0, requests_per_s=80.0, tail=0.0)


def recorded(scenario: Scenario) -> WhatIf:
    evidence = Evidence()
    evidence.add(simulate(scenario))
    assert evidence.traffic_ns is not None
    found = what_if(evidence, evidence.traffic_ns[0] + 2 * SECOND, evidence.traffic_ns[1] - SECOND)
    assert found is not None
    return replace(found, shares_cores=False)  # in the simulation nobody does


@pytest.fixture(scope="module")
def base() -> WhatIf:
    return recorded(SATURATED)


def made(scenario: Scenario, base: WhatIf) -> float:
    """Return the throughput of a run over that of the base, as measured."""
    return tokens_per_s(recorded(scenario).graph) / tokens_per_s(base.graph)


def test_no_change_changes_nothing(base: WhatIf) -> None:
    found = base.predict(Change())
    assert found.throughput == found.cycle == 1.0
    assert found.residual < 0.03
    assert not found.is_sure


@pytest.mark.parametrize("in_flight", [1, 4])
def test_other_micro_batches_in_flight_come_true(base: WhatIf, in_flight: int) -> None:
    """The same sixteen requests spread over fewer slots or more."""
    found = replace(base, waiting=0.0).predict(Change(in_flight=in_flight))
    changed = replace(SATURATED, in_flight=in_flight, most_requests=16 // in_flight)
    assert found.throughput == pytest.approx(made(changed, base), rel=0.1)
    assert found.period_ns == pytest.approx(recorded(changed).graph.period_ns, rel=0.1)


def test_slots_that_are_added_take_who_waits(base: WhatIf) -> None:
    """Arrivals outrun the simulated server by far: four slots of eight are filled as well as two."""
    assert base.waiting > 50
    found = base.predict(Change(in_flight=4))
    assert found.throughput == pytest.approx(made(replace(SATURATED, in_flight=4), base), rel=0.1)


def test_a_slower_stage_comes_true(base: WhatIf) -> None:
    found = base.predict(parse_changes(["speed=1:+6ms"]))
    slow = replace(SATURATED, faults=(Fault("slow", 0.0, 1, ms=6.0, on_cpu=True),))
    assert found.throughput == pytest.approx(made(slow, base), rel=0.05)
    assert found.is_sure


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_rank_replaced_by_its_baseline_is_the_healthy_run(base: WhatIf, on_cpu: bool) -> None:
    slow = recorded(replace(SATURATED, faults=(Fault("slow", 0.0, 0, ms=9.0, on_cpu=on_cpu),)))
    found = slow.predict(Change(replaced=(0,)))
    assert tokens_per_s(slow.graph) * found.throughput == pytest.approx(tokens_per_s(base.graph), rel=0.07)


def test_an_excess_is_taken_from_what_was_off_the_core_first(base: WhatIf) -> None:
    slow = recorded(replace(SATURATED, faults=(Fault("slow", 0.0, 1, ms=9.0),)))
    found = slow.predict(Change(speeds=(Speed(1, off_ns=-9e6),)))
    assert found.period_ns == pytest.approx(base.graph.period_ns, rel=0.05)


def test_another_split_moves_the_forward_pass_and_leaves_the_rest(base: WhatIf) -> None:
    """Four layers each; stage 1 takes longer by its head. A layer fewer there is a layer more on stage 0."""
    found = base.predict(Change(split=(5, 3)))
    worse = base.predict(Change(split=(7, 1)))
    assert found.throughput == pytest.approx(1.0, abs=0.25)
    assert worse.throughput < 0.85
    busy = base.graph.on_ns.sum(axis=2).mean(axis=0)
    assert worse.period_ns == pytest.approx(busy[0] * 7 / 4, rel=0.15)


def _replayed(one: WhatIf) -> float:
    """Return what undoes that a prediction is told relative to the record: these graphs were made, not recorded."""
    return one.busy_ns / one.predict(Change()).before_ns


def test_waiting_for_a_core_does_not_grow_with_the_layers(base: WhatIf) -> None:
    """A rank that computes for longer waits less often, if anything: the run queue is met on waking up."""
    off_ns = np.full_like(base.graph.off_ns, 1e6)
    waiting = replace(base, graph=replace(base.graph, off_ns=off_ns, queued_share=np.ones(2)))
    without = replace(base, graph=replace(base.graph, off_ns=np.zeros_like(off_ns)))
    slow, quick = (one.predict(Change(split=(7, 1))).period_ns * _replayed(one) for one in (waiting, without))
    assert slow - quick == pytest.approx(3e6, rel=0.05)


def test_another_split_or_number_in_flight_is_told_less_surely_than_another_speed(base: WhatIf) -> None:
    slower, split, fuller = (
        base.predict(parse_changes([text])) for text in ("speed=1:0.5", "split=5,3", "in-flight=3")
    )
    assert slower.error < split.error <= fuller.error


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0, 1]), st.floats(1.0, 4.0))
def test_more_speed_is_never_predicted_to_lower_throughput(base: WhatIf, stage: int, factor: float) -> None:
    assert base.predict(Change(speeds=(Speed(stage, factor),))).throughput >= 1.0 - 1e-9


def test_slots_without_requests_do_not_run() -> None:
    quiet = recorded(replace(SATURATED, requests_per_s=3.0))
    assert quiet.waiting < 0.5
    few = quiet.predict(Change(in_flight=64))
    assert few.in_flight <= max(1, round(quiet.graph.num_requests))


def test_changes_are_read_together() -> None:
    asked = parse_changes(["split=5,3", "in-flight=3", "speed=1:2.0", "speed=0:-1.5ms", "replace=1"])
    assert asked == Change((5, 3), 3, (Speed(1, 2.0), Speed(0, on_ns=-1.5e6)), (1,))


@pytest.mark.parametrize(
    "text",
    [
        *("", "split", "split=", "split=a", "in-flight=0", "in-flight=x", "in-flight=1000000", "slots=3"),
        *("speed=1", "speed=1:0", "speed=x:2", "speed=1:2ms", "speed=-1:2", "replace=", "replace=one"),
    ],
)
def test_what_is_no_change_is_one_line(text: str) -> None:
    with pytest.raises(NoPrediction, match=r"^.* is not split=5,3") as caught:
        parse_changes([text])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("split=6,3", "sum to 8 layers"),
        ("split=8", "it needs 2 numbers"),
        ("split=8,0", "at least 1"),
        ("speed=2:2", "no stage 2; the run has stages 0..1"),
        ("replace=7", "no rank 7; the run has ranks 0, 1"),
    ],
)
def test_a_change_that_does_not_fit_the_run_is_one_line(base: WhatIf, text: str, why: str) -> None:
    with pytest.raises(NoPrediction, match=why):
        base.predict(parse_changes([text]))


def test_a_healthy_peer_must_be_known() -> None:
    cold = recorded(replace(SATURATED, warmup_steps=0))
    with pytest.raises(NoPrediction, match="no warm-up was recorded"):
        cold.predict(Change(replaced=(0,)))


def test_a_prediction_is_sure_beyond_what_the_replay_misses() -> None:
    told = Prediction(1.0, 1.0, 1.04, 1.0, 0.05, 0.05, 2, 100, "")
    assert not told.is_sure
    assert replace(told, residual=0.03).is_sure
    assert replace(told, throughput=0.9).is_sure
