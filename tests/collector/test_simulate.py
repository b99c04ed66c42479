"""Simulated runs: any grid, faults that leave the marks they should, and no word of the judge's in their code."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import insitu_collector.simulate
from insitu.records import schema_of
from insitu.rules.sampling import is_sampled
from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import numbers
from insitu_collector.simulate import RUN, SECOND, Fault, Scenario, simulate
from insitu_collector.simulate.recorded import RecordedService, recorded_steps, shipped_steps

CODE = Path(insitu_collector.simulate.__file__).parent
GRID = Scenario(seed=5, seconds=4.0, base_ms=(4.0, 4.0), tensor_parallel=3, noise=0.02, tail=0.0)
Rows = dict[str, np.ndarray]


def columns(table: pa.Table, **wanted: int) -> Rows:
    """Return the integer columns of a table's rows in which some columns have some value."""
    found = {f.name: numbers(table, f.name, -9) for f in table.schema if pa.types.is_integer(f.type)}
    keep = np.ones(table.num_rows, bool)
    for name, value in wanted.items():
        keep &= found[name] == value
    return {name: column[keep] for name, column in found.items()}


def lengths_ms(tables: dict[str, pa.Table], cls: IntervalClass, rank: int) -> np.ndarray:
    rows = columns(tables["intervals"], rank=rank, cls=int(cls))
    return (rows["t1_ns"] - rows["t0_ns"]) / 1e6


def test_the_code_shares_nothing_with_the_judge() -> None:
    """What it may import is named here; no word of ledgers or verdicts is in it."""
    allowed = (
        "cli",
        "records",
        "vocabulary",
        "sites.never_fired",
        "rules.sampling",
        "segments.shard",
        "exporters.base",
    )
    names = {f"insitu.{name}" for name in allowed} | {"insitu_collector.store", "insitu_collector.opening"}
    for file in sorted(CODE.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("insitu"):
                assert node.module in names or (node.module or "").startswith("insitu_collector.simulate"), file
        text = file.read_text()
        for word in ("LedgerClass", "VerdictKind", "ledger", "verdict", "evidence", "judgement", "SEVERITY"):
            assert word not in text, f"{file.name} knows the word {word}"


@settings(max_examples=15, deadline=None)
@given(
    stages=st.integers(1, 4),
    width=st.integers(1, 3),
    replicas=st.integers(1, 2),
    hosts=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_grid_leaves_a_whole_record(stages: int, width: int, replicas: int, hosts: int, seed: int) -> None:
    scenario = Scenario(
        seed=seed,
        seconds=1.0,
        base_ms=(3.0,) * stages,
        tensor_parallel=width,
        replicas=replicas,
        hosts=min(hosts, stages * width * replicas),
        warmup_steps=8,
    )
    tables = simulate(scenario)
    for name, table in tables.items():
        assert table.schema.equals(schema_of(name))
    assert sorted(set(tables["sources"]["rank"].to_pylist())) == list(range(-1, scenario.num_ranks))
    for rank in range(scenario.num_ranks):
        place, rows = scenario.place(rank), columns(tables["intervals"], rank=rank)
        assert scenario.rank(place.replica, place.stage, place.tp) == rank
        assert (rows["t1_ns"] > rows["t0_ns"]).all()
        assert (rows["t0_ns"][1:] >= rows["t1_ns"][:-1]).all(), "intervals of one rank never overlap"
        assert (rows["row_seq"] == np.arange(len(rows["row_seq"]))).all()
        assert (rows["cpu_ns"] <= rows["t1_ns"] - rows["t0_ns"]).all()


def test_all_peers_take_part_in_each_collective_and_leave_it_together() -> None:
    tables = simulate(GRID)
    waits = [columns(tables["intervals"], rank=rank, cls=int(IntervalClass.COLLECTIVE_WAIT)) for rank in (3, 4, 5)]
    for rows in waits:
        assert (rows["step_id"] == waits[0]["step_id"]).all()
        assert (rows["t1_ns"] == waits[0]["t1_ns"]).all()
        assert (np.bincount(rows["step_id"]) == GRID.collectives).all()
    last = np.max([rows["t0_ns"] for rows in waits], axis=0)
    assert (waits[0]["t1_ns"] - last == 50_000).all(), "it takes so long once the last has come"


def test_a_slow_rank_makes_its_peers_wait_and_waits_for_nobody() -> None:
    slow = simulate(replace(GRID, faults=(Fault("slow", 0.0, 1, ms=8.0, tp=1),)))
    healthy = simulate(GRID)
    for rank in (3, 5):
        assert np.median(lengths_ms(slow, IntervalClass.COLLECTIVE_WAIT, rank)) > 3.5
        assert np.median(lengths_ms(healthy, IntervalClass.COLLECTIVE_WAIT, rank)) < 0.3
    assert np.median(lengths_ms(slow, IntervalClass.COLLECTIVE_WAIT, 4)) == pytest.approx(0.05)


def test_a_slow_link_is_seen_where_it_arrives() -> None:
    tables = simulate(replace(GRID, faults=(Fault("slow_link", 0.0, 0, ms=6.0),)))
    assert np.median(lengths_ms(tables, IntervalClass.RECV_XFER, 3)) == pytest.approx(6.1, abs=0.01)
    assert np.median(lengths_ms(tables, IntervalClass.RECV_XFER, 0)) == pytest.approx(0.1, abs=0.01)


def test_failing_slowly_reaches_its_factor_over_its_ramp() -> None:
    fault = Fault("fail_slow", 1.0, 1, factor=2.0, ramp_s=2.0)
    tables = simulate(replace(GRID, requests_per_s=40.0, faults=(fault,)))
    usual = simulate(replace(GRID, requests_per_s=40.0))

    def host_ms(of: dict[str, pa.Table], begin: float, end: float) -> float:
        rows = columns(of["intervals"], rank=3, cls=int(IntervalClass.HOST))
        traffic = int(of["events"]["t_ns"][0].as_py())
        inside = (rows["t0_ns"] >= traffic + begin * SECOND) & (rows["t0_ns"] < traffic + end * SECOND)
        return float(np.median((rows["t1_ns"] - rows["t0_ns"])[inside])) / 1e6

    assert host_ms(tables, 0.2, 1.0) == pytest.approx(host_ms(usual, 0.2, 1.0), rel=0.1)
    assert 1.2 < host_ms(tables, 1.7, 2.3) / host_ms(usual, 1.7, 2.3) < 1.8
    assert 1.7 < host_ms(tables, 3.2, 4.0) / host_ms(usual, 3.2, 4.0) < 2.3


def test_a_factor_is_of_the_whole_step_sampling_too() -> None:
    grid = replace(GRID, tensor_parallel=1, noise=0.0, requests_per_s=40.0)
    slow, usual = (simulate(replace(grid, faults=f)) for f in ((Fault("fail_slow", 0.0, 1, factor=2.0),), ()))
    sampling = [columns(of["intervals"], rank=1, cls=int(IntervalClass.SAMPLE)) for of in (slow, usual)]
    last = [(rows["t1_ns"] - rows["t0_ns"])[rows["step_id"] >= grid.warmup_steps].min() for rows in sampling]
    assert last[0] == 2 * last[1]


def test_others_slow_the_steps_of_the_host_they_use_and_of_no_other() -> None:
    grid = replace(GRID, tensor_parallel=1, hosts=2, requests_per_s=40.0)
    tables = simulate(replace(grid, faults=(Fault("foreign", 0.0, host=1, size=1.5),)))
    delay = {
        rank: tables["health"].filter(pa.compute.equal(tables["health"]["rank"], rank))["run_delay_ns"].to_pylist()[-1]
        for rank in (0, 1)
    }
    assert delay[0] == 0 < delay[1]


def test_too_little_memory_makes_requests_wait_and_says_so() -> None:
    tables = simulate(replace(GRID, requests_per_s=30.0, faults=(Fault("kv_small", 0.0, size=150),)))
    events = tables["requests"]["event"].to_pylist()
    assert events.count(9) > 10
    assert simulate(GRID)["requests"]["event"].to_pylist().count(9) == 0


def test_long_prompts_come_in_the_share_that_was_asked_for() -> None:
    fault = Fault("long_prompts", 0.0, size=400, share=0.5)
    maps = simulate(replace(GRID, requests_per_s=40.0, faults=(fault,)))["steps"].filter(
        pa.compute.equal(pa.compute.field("rank"), 0)
    )["rows"]
    prompts = [e["count"] for rows in maps.to_pylist() for e in rows if e["count"] > 1 and e["request"][:3] == "req"]
    assert 0.3 < sum(count == 400 for count in prompts) / len(prompts) < 0.7


def test_fewer_micro_batches_in_flight_are_fewer_slots() -> None:
    scenario = replace(GRID, in_flight=2, requests_per_s=60.0, faults=(Fault("underfilled", 2.0, size=1),))
    tables = simulate(scenario)
    steps = columns(tables["steps"], rank=0)
    traffic = int(tables["events"]["t_ns"][0].as_py())
    late = steps["t0_ns"] > traffic + 3 * SECOND
    assert set(steps["mb"][~late]) == {0, 1}
    assert set(steps["mb"][late]) == {0}


def test_lost_rows_leave_holes_and_are_counted() -> None:
    tables = simulate(replace(GRID, faults=(Fault("drop", 1.0, 1, share=0.2),)))
    rows = columns(tables["intervals"], rank=3)
    missing = int(rows["row_seq"][-1]) + 1 - len(rows["row_seq"])
    beats = tables["health"].filter(pa.compute.equal(tables["health"]["rank"], 3)).to_pylist()
    counted = beats[-1]["dropped"][0]["rows"]
    assert 0 < counted <= missing
    assert not beats[0]["dropped"]
    assert columns(tables["intervals"], rank=0)["row_seq"][-1] + 1 == len(columns(tables["intervals"], rank=0)["cls"])


def test_a_silent_site_writes_nothing_and_its_session_says_so() -> None:
    tables = simulate(replace(GRID, faults=(Fault("silent_site", stage=0),)))
    assert len(columns(tables["summaries"], rank=0)["site"]) == 0
    assert len(columns(tables["summaries"], rank=3)["site"]) > 100
    told = [(row["rank"], row["kind"], row["text"]) for row in tables["events"].to_pylist() if row["rank"] >= 0]
    assert told == [(rank, "site_never_fired", "L3.resid_post") for rank in range(3)]


def test_a_router_that_is_asked_to_favours_one_expert_by_that_share_and_no_other_router_does() -> None:
    fault = Fault("experts", 1.0, 1, layer=2, share=0.8)
    scenario = replace(GRID, requests_per_s=40.0, experts=8, faults=(fault,))
    tables = simulate(scenario)
    names = {(row["rank"], row["site"]): row["name"] for row in tables["sites"].to_pylist()}
    steps = tables["steps"].filter(pa.compute.equal(tables["steps"]["rank"], 3)).to_pylist()
    begun = int(tables["events"]["t_ns"][0].as_py()) + SECOND
    late = {step["step_id"] for step in steps if step["t0_ns"] >= begun}
    shares = {}
    for rank in (0, 3, 4):
        for layer in range(4):
            rows = [row for row in tables["expert_loads"].to_pylist() if row["rank"] == rank]
            rows = [row for row in rows if names[rank, row["site"]] == f"L{4 * (rank // 3) + layer}.router_logits"]
            assert all(sum(row["load"]) == 2 * row["num_rows"] for row in rows)
            load = np.sum([row["load"] for row in rows if row["step_id"] in late], axis=0)
            shares[rank, layer] = 2 * float(load.max() / load.sum())
    assert shares[3, 2] == pytest.approx(0.8, abs=0.05)
    assert max(share for router, share in shares.items() if router not in ((3, 2), (4, 2))) < 0.6
    assert [shares[3, layer] for layer in range(4)] == [shares[4, layer] for layer in range(4)], "one router on both"


def test_loads_are_of_the_steps_that_every_rank_samples_and_dense_layers_have_none() -> None:
    tables = simulate(replace(GRID, experts=4))
    sampled = {int(step) for step in np.unique(columns(tables["steps"])["step_id"]) if is_sampled(RUN, int(step), 16)}
    assert sampled == set(columns(tables["expert_loads"])["step_id"].tolist())
    assert "expert_loads" not in simulate(GRID)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"faults": (Fault("sloth"),)}, "no fault sloth"),
        ({"tensor_parallel": 300}, "600 ranks"),
        ({"hosts": 7}, "7 hosts for 6 ranks"),
        ({"faults": (Fault("slow", stage=2),)}, "outside the grid"),
        ({"faults": (Fault("experts", stage=1),)}, "no layer 0 with experts"),
        ({"experts": 8, "faults": (Fault("experts", stage=1, layer=4),)}, "no layer 4 with experts"),
        ({"experts": 2}, "2 of 2 experts"),
        ({"tensor_parallel": 1, "faults": (Fault("hang_collective", stage=1),)}, "tensor_parallel is 1"),
    ],
)
def test_what_cannot_be_simulated_is_said(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(GRID, **wrong)  # type: ignore[arg-type]


def test_recorded_steps_are_taken_out_of_a_record_and_drawn_again() -> None:
    """What is drawn is what was recorded for steps of like shape, on the first and on the last stage."""
    tables = simulate(Scenario(seed=2, seconds=20.0, base_ms=(3.0, 9.0), tail=0.0, noise=0.02))
    steps = recorded_steps(tables)
    again = simulate(Scenario(seed=3, seconds=10.0, base_ms=(0.0,) * 3), RecordedService(steps, 3))

    def decode_ms(of: dict[str, pa.Table], rank: int) -> float:
        shape, rows = (
            columns(of["steps"], rank=rank),
            columns(of["intervals"], rank=rank, cls=int(IntervalClass.COMPUTE)),
        )
        small = set(shape["step_id"][(shape["num_rows"] == 1)].tolist())
        lengths = (rows["t1_ns"] - rows["t0_ns"])[[step in small for step in rows["step_id"].tolist()]]
        return float(np.median(lengths)) / 1e6

    assert decode_ms(again, 0) == pytest.approx(decode_ms(tables, 0), rel=0.1)
    assert decode_ms(again, 2) == pytest.approx(decode_ms(tables, 1), rel=0.1)
    assert decode_ms(again, 0) < 0.5 * decode_ms(again, 2)


def test_the_shipped_steps_are_of_a_real_run() -> None:
    steps = shipped_steps()
    assert set(steps["place"].to_pylist()) == {0, 2}
    assert steps.num_rows > 500
    core = np.asarray(steps["core_us"])
    assert (core > 0).all() and np.median(core) < 100_000


def test_too_few_steps_are_nothing_to_draw_from() -> None:
    tables = simulate(Scenario(seed=2, seconds=0.01, requests_per_s=0.001, warmup_steps=3))
    with pytest.raises(ValueError, match="50 are needed"):
        recorded_steps(tables)
