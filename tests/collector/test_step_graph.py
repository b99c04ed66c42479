"""The step graph of a window: what steps needed, what lay between them, and that it replays as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass
from insitu_collector.evidence import Evidence
from insitu_collector.simulate import MS, SECOND, Fault, Scenario, simulate
from insitu_collector.whatif.graph import MAIN, StepGraph, record
from insitu_collector.whatif.predict import unchanged
from insitu_collector.whatif.replay import replay as run_again

SATURATED = Scenario(seconds=6.0, requests_per_s=60.0)


def evidence_of(scenario: Scenario) -> Evidence:
    evidence = Evidence()
    evidence.add(simulate(scenario))
    return evidence


def graph_of(scenario: Scenario) -> StepGraph:
    evidence = evidence_of(scenario)
    assert evidence.traffic_ns is not None
    found = record(evidence, evidence.traffic_ns[0] + SECOND, evidence.traffic_ns[1])
    assert found is not None
    return found


stage_times = st.lists(st.floats(2.0, 12.0), min_size=2, max_size=4)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), stage_times, st.integers(1, 4))
@example(1, [2.0, 10.5], 4)
def test_the_unchanged_replay_has_the_recorded_period(seed: int, base_ms: list[float], in_flight: int) -> None:
    """Over hundreds of steps: where the record is cut off, each step in flight may count or not."""
    scenario = replace(SATURATED, seed=seed, base_ms=tuple(base_ms), in_flight=in_flight, seconds=6.0)
    assert unchanged_over_recorded(graph_of(replace(scenario, requests_per_s=200.0))) == pytest.approx(1.0, rel=0.02)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), stage_times, st.integers(1, 4), st.floats(10.0, 40.0))
def test_slots_that_had_nothing_to_do_are_kept_so(seed: int, base_ms: list[float], in_flight: int, rate: float) -> None:
    """Less exactly: when a slot got work again while the first rank was busy is not recorded."""
    scenario = replace(SATURATED, seed=seed, base_ms=tuple(base_ms), in_flight=in_flight, seconds=3.0)
    assert unchanged_over_recorded(graph_of(replace(scenario, requests_per_s=rate))) == pytest.approx(1.0, rel=0.1)


def unchanged_over_recorded(graph: StepGraph) -> float:
    """Return the period of the unchanged replay over the recorded one."""
    again = run_again(unchanged(graph, closed=False))
    return again.period_ns / graph.period_from(again.first)


def test_what_a_step_needs_is_taken_apart() -> None:
    graph = graph_of(replace(SATURATED, tail=0.0, faults=(Fault("slow", 0.0, 1, ms=7.0),)))
    calm = graph_of(replace(SATURATED, tail=0.0))
    assert (graph.ranks, graph.num_stages, graph.num_slots, graph.rendezvous) == ((0, 1), 2, 2, False)
    slept = np.median(graph.off_ns[:, 1, MAIN]) - np.median(calm.off_ns[:, 1, MAIN])
    assert slept == pytest.approx(7.0 * MS, rel=0.05)
    assert np.median(graph.on_ns[:, 1]) == pytest.approx(np.median(calm.on_ns[:, 1]), rel=0.1)
    assert graph.layers_share[0] == pytest.approx(0.95, abs=0.001)
    assert 0.8 < graph.layers_share[1] < 0.95, "the last stage samples too"
    assert np.median(calm.wire_ns) == pytest.approx(0.1 * MS, rel=0.01)


def test_requests_that_run_at_once_are_those_of_all_slots() -> None:
    assert graph_of(SATURATED).num_requests == pytest.approx(16.0, rel=0.1)
    assert graph_of(replace(SATURATED, in_flight=1)).num_requests == pytest.approx(8.0, rel=0.1)


def test_the_cores_that_are_left_are_those_that_others_do_not_use() -> None:
    alone, crowded = graph_of(SATURATED), graph_of(replace(SATURATED, bursts=((0.0, 9.0, 0.8),)))
    assert alone.cores == pytest.approx(2.0, abs=0.05)
    assert crowded.cores == pytest.approx(1.2, abs=0.1)
    assert alone.driver_ns == pytest.approx(0.1 * alone.period_ns, rel=0.1)


def test_too_few_steps_or_one_stage_are_no_graph() -> None:
    evidence = evidence_of(SATURATED)
    assert evidence.traffic_ns is not None
    begin = evidence.traffic_ns[0]
    assert record(evidence, begin, begin + 80 * MS) is None
    alone = evidence_of(replace(SATURATED, base_ms=(5.0,), in_flight=1))
    assert alone.traffic_ns is not None
    assert record(alone, *alone.traffic_ns) is None


def test_the_busiest_rank_of_a_stage_stands_for_it() -> None:
    """Rank 2 is of stage 1 too, and what it computes takes 2 ms longer."""
    tables = simulate(SATURATED)
    mine = pc.equal(tables["intervals"]["rank"], 1)
    rows = tables["intervals"].filter(mine).to_pylist()
    slower = [
        row | {"rank": 2, "epoch": 3, "t1_ns": row["t1_ns"] + (2 * MS if row["cls"] == IntervalClass.COMPUTE else 0)}
        for row in rows
    ]
    source = tables["sources"].filter(pc.equal(tables["sources"]["rank"], 1)).to_pylist()
    for name, more in (("intervals", slower), ("sources", [row | {"rank": 2, "epoch": 3} for row in source])):
        tables[name] = pa.concat_tables([tables[name], pa.Table.from_pylist(more, schema=schema_of(name))])
    evidence = Evidence()
    evidence.add(tables)
    assert evidence.traffic_ns is not None
    assert evidence.stages == {0: 0, 1: 1, 2: 1}
    found = record(evidence, *evidence.traffic_ns)
    assert found is not None
    assert found.ranks == (0, 2)
