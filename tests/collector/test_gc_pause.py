"""Verdict `gc_pause`: what collecting took of a core counts, of pauses that can delay a step."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts import gc_pause

SCENARIO = Scenario(seed=2, seconds=6.0, faults=(Fault("gc", 3.0, 1, ms=180.0),))


def with_core_share(intervals: pa.Table, share: float) -> pa.Table:
    """Return the intervals with collections that were on a core for this share of their time."""
    took = pc.subtract(intervals["t1_ns"], intervals["t0_ns"])
    on_core = pc.cast(pc.multiply(pc.cast(took, pa.float64()), share), pa.int64(), safe=False)
    is_gc = pc.equal(intervals["cls"], int(IntervalClass.GC))
    place = intervals.schema.get_field_index("cpu_ns")
    return intervals.set_column(place, "cpu_ns", pc.if_else(is_gc, on_core, intervals["cpu_ns"]))


@pytest.mark.parametrize(("share", "is_told"), [(1.0, True), (0.7, True), (0.3, False), (0.05, False)])
def test_a_collection_that_waits_for_a_core_is_no_pause_of_the_collectors(share: float, is_told: bool) -> None:
    tables = simulate(SCENARIO)
    evidence = Evidence()
    evidence.add(tables | {"intervals": with_core_share(tables["intervals"], share)})
    found = gc_pause.look(evidence, evidence.warmup_end_ns or 0)
    assert [(finding.kind, finding.on_rank) for finding in found] == [(VerdictKind.GC_PAUSE, 1)] * is_told


def with_pauses(intervals: pa.Table, rank: int, begin_ns: int) -> pa.Table:
    """Return the intervals and seven pauses of a rank, in no step: 70 ms each, one every 100 ms from `begin_ns` on."""
    mine = intervals.filter(pc.equal(intervals["rank"], rank)).slice(0, 1).to_pylist()[0]
    pauses = [
        {
            **mine,
            "cls": int(IntervalClass.GC),
            "step_id": -1,
            "t0_ns": begin_ns + place * 100_000_000,
            "t1_ns": begin_ns + place * 100_000_000 + 70_000_000,
            "cpu_ns": 70_000_000,
        }
        for place in range(7)
    ]
    return pa.concat_tables([intervals, pa.Table.from_pylist(pauses, schema=intervals.schema)])


@pytest.mark.parametrize(("after_ms", "is_told"), [(-1060, False), (-100, True), (200, True)])
def test_pauses_before_a_ranks_first_step_are_the_start_of_its_program(after_ms: int, is_told: bool) -> None:
    tables = simulate(Scenario(seed=2, seconds=1.5))
    steps = tables["intervals"].filter(pc.field("rank") == 1).filter(pc.field("step_id") >= 0)
    begin = pc.min(steps["t0_ns"]).as_py() + after_ms * 1_000_000
    del tables["events"]  # no `warmup_end`: the steps alone say when the rank began
    evidence = Evidence()
    evidence.add(tables | {"intervals": with_pauses(tables["intervals"], 1, begin)})
    found = gc_pause.look(evidence, evidence.warmup_end_ns or 0)
    assert [(finding.kind, finding.on_rank) for finding in found] == [(VerdictKind.GC_PAUSE, 1)] * is_told
