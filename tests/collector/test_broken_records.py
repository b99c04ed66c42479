"""Records with holes: what is judged of them is true or undecided, and nothing ever raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judged_kit import every_revision

from insitu.records import schema_of
from insitu.vocabulary import VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.ledger.window import rank_ledger
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.verdicts.finding import OPEN, Verdict, standing
from insitu_collector.views.stalls import stalls

Tables = dict[str, pa.Table]

RUN = Scenario(seed=3, seconds=9.0)
SLOW = replace(RUN, faults=(Fault("slow", 4.0, 1, ms=20.0),))
TENSOR = replace(RUN, base_ms=(4.0, 4.0), tensor_parallel=2, faults=(Fault("slow", 4.0, 1, ms=12.0, tp=1),))
RUNS = {"healthy": RUN, "slow stage": SLOW, "slow rank": TENSOR}
TRUE_OF: dict[str, set[tuple[VerdictKind, int | None]]] = {
    "healthy": set(),
    "slow stage": {(VerdictKind.STAGE_LIMITS, 1)},
    "slow rank": {(VerdictKind.STRAGGLER_RANK, 3)},
}
QUIET = {VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE, VerdictKind.HOST_CONTENDED, VerdictKind.CLOCK_UNCERTAIN}
LOSSY = ("intervals", "steps", "summaries", "requests", "health", "events", "sites")


@pytest.fixture(scope="module")
def runs() -> dict[str, Tables]:
    return {name: simulate(scenario) for name, scenario in RUNS.items()}


def revisions(tables: Tables) -> tuple[list[Verdict], list[Verdict]]:
    """Everything that was ever said, and what stands."""
    told = every_revision(tables)
    return told, standing(told)


def judged(tables: Tables) -> list[Verdict]:
    return revisions(tables)[1]


def places(told: list[Verdict]) -> set[tuple[VerdictKind, int | None]]:
    return {(VerdictKind(verdict.kind), verdict.on_rank) for verdict in told if verdict.kind not in QUIET}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(RUNS)), rank=st.integers(0, 1), first=st.floats(0, 6), length=st.floats(0.2, 4))
def test_a_stretch_of_one_rank_lost_never_points_elsewhere(
    runs: dict[str, Tables], name: str, rank: int, first: float, length: float
) -> None:
    rows = runs[name]["intervals"]
    at_s = (np.asarray(rows["t0_ns"]) - int(pc.min(rows["t0_ns"]).as_py())) / 1e9
    lost = (np.asarray(rows["rank"]) == rank) & (at_s >= first) & (at_s < first + length)
    assert places(judged(runs[name] | {"intervals": rows.filter(pa.array(~lost))})) <= TRUE_OF[name]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone_is_not_compared_with_others(runs: dict[str, Tables], name: str, rank: int) -> None:
    alone = {
        table: rows.filter(pc.is_in(rows["rank"], pa.array([rank, -1], pa.int16())))
        for table, rows in runs[name].items()
    }
    assert places(judged(alone)) <= TRUE_OF[name]


def test_nothing_at_all_is_nothing_said() -> None:
    assert judged({name: schema_of(name).empty_table() for name in LOSSY}) == []


@pytest.mark.parametrize(("table", "column"), [("requests", "event"), ("steps", "phase"), ("health", "open_cls")])
def test_numbers_of_a_later_version_are_not_taken_for_known_ones(
    runs: dict[str, Tables], table: str, column: str
) -> None:
    rows = runs["healthy"][table]
    place = rows.schema.get_field_index(column)
    strange = pa.array(
        np.where(np.arange(rows.num_rows) % 3 == 0, 200, np.asarray(rows[column].fill_null(4))), pa.uint8()
    )
    told = judged(runs["healthy"] | {table: rows.set_column(place, rows.schema.field(place), strange)})
    assert places(told) == set()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RUNS)
def test_heartbeats_that_got_lost_are_not_silence(runs: dict[str, Tables], name: str, seed: int) -> None:
    rows = runs[name]["health"]
    kept = np.random.default_rng(seed).random(rows.num_rows) < 0.5
    assert places(judged(runs[name] | {"health": rows.filter(pa.array(kept))})) <= TRUE_OF[name]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("name", RUNS)
def test_requests_that_got_lost_delay_nobody(runs: dict[str, Tables], name: str, share: float) -> None:
    rows = runs[name]["requests"]
    kept = np.random.default_rng(1).random(rows.num_rows) < share
    assert places(judged(runs[name] | {"requests": rows.filter(pa.array(kept))})) <= TRUE_OF[name]


def test_steps_with_time_of_an_unknown_class_are_not_compared(runs: dict[str, Tables]) -> None:
    rows = runs["healthy"]["intervals"]
    strange = np.random.default_rng(2).random(rows.num_rows) < 1 / 3
    cls = pa.array(np.where(strange, 200, np.asarray(rows["cls"])), pa.uint8())
    place = rows.schema.get_field_index("cls")
    told = judged(runs["healthy"] | {"intervals": rows.set_column(place, rows.schema.field(place), cls)})
    assert [verdict.kind for verdict in told] == [VerdictKind.INCONCLUSIVE]
    assert "classes that this version does not know" in told[0].text


@pytest.mark.parametrize(
    ("kind", "ms"),
    [("clock_offset", -5_000.0), ("clock_offset", 3_000.0), ("clock_jump", 40.0), ("clock_unknown", 0.0)],
)
def test_clocks_that_are_off_or_jump_blame_nobody(kind: str, ms: float) -> None:
    scenario = replace(RUN, hosts=2, faults=(Fault(kind, 4.0, ms=ms, host=1),))
    assert places(judged(simulate(scenario))) == set()


@pytest.mark.parametrize("ms", [-100_000.0, -20_000.0, -5_000.0, 5_000.0, 20_000.0, 100_000.0])
@pytest.mark.parametrize(("hosts", "host"), [(1, 0), (2, 0), (2, 1)])
def test_clocks_that_leap_by_seconds_name_nobody_and_are_said(hosts: int, host: int, ms: float) -> None:
    tables = simulate(replace(RUN, hosts=hosts, faults=(Fault("clock_jump", 4.0, ms=ms, host=host),)))
    told, last = revisions(tables)
    assert places(told) == set()
    assert {verdict.kind for verdict in last} < {VerdictKind.INCONCLUSIVE, VerdictKind.CLOCK_UNCERTAIN}
    assert (last[0].kind == VerdictKind.INCONCLUSIVE) == (hosts == 1)
    why = ("the clock of host", "its clock jumped by", "arrive before they were sent")
    assert any(each in last[0].text for each in why)
    sources, clocks = tables["sources"], tables.get("clocks")
    t0_ns = int(pc.min(tables["intervals"]["t0_ns"].filter(pc.equal(tables["intervals"]["rank"], 0))).as_py())
    found = rank_ledger(tables["intervals"], tables["health"], sources, t0_ns, t0_ns + 9 * 10**9, clocks)
    assert {found.ns(rank) for rank in found.ranks} == {9 * 10**9} and min(row.ns for row in found.rows) >= 0


def at_the_leap(steady: Tables, leapt: Tables) -> tuple[Tables, Tables]:
    """What was written before a clock leapt, and after. steady: the same run without the leap."""
    before, after = dict(leapt), {}
    for name, column in (("intervals", "t1_ns"), ("steps", "t0_ns"), ("health", "t_ns"), ("requests", "t_ns")):
        same = pc.equal(steady[name][column], leapt[name][column])
        before[name], after[name] = leapt[name].filter(same), leapt[name].filter(pc.invert(same))
    return before, after


@pytest.mark.parametrize("ms", [-100_000.0, -20_000.0, 20_000.0, 100_000.0])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_run_that_was_healthy_until_its_clock_leapt_is_no_longer_said_to_be(hosts: int, ms: float) -> None:
    fault = Fault("clock_jump", 9.0, ms=ms, host=hosts - 1)
    scenario = replace(RUN, seconds=14.0, hosts=hosts)
    before, after = at_the_leap(simulate(scenario), simulate(replace(scenario, faults=(fault,))))
    judgement = Judgement()
    told = [verdict for part in seconds(before) for verdict in judgement.look(part)]
    told += judgement.look(after) + judgement.look({}, final=True)
    last = standing(told)
    assert (VerdictKind.HEALTHY, OPEN) in {(verdict.kind, verdict.state) for verdict in told}
    assert last and VerdictKind.HEALTHY not in {verdict.kind for verdict in last} and places(told) == set()
    assert hosts == 2 or "the clock of host" in last[0].text
    assert hosts == 2 or "a minute after" in last[0].remedy


@pytest.mark.parametrize("ms", [-3_600_000.0, 3_600_000.0])
def test_a_leap_of_an_hour_on_one_of_two_hosts_blinds_nobody(ms: float) -> None:
    faults = Fault("clock_jump", 4.0, ms=ms, host=1), Fault("nan", 14.0, 1)
    told, last = revisions(simulate(replace(RUN, seconds=20.0, hosts=2, faults=faults)))
    assert places(told) == {(VerdictKind.FIRST_NONFINITE, 1)}
    assert VerdictKind.CLOCK_UNCERTAIN in {verdict.kind for verdict in last}


def half_of_the_segments(store: Path) -> None:
    for file in sorted((store / "v1").rglob("*.arrow"))[::2]:
        file.unlink()


def a_torn_file(store: Path) -> None:
    file = max((store / "v1").rglob("*.arrow"), key=lambda path: path.stat().st_size)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [half_of_the_segments, a_torn_file])
def test_stalls_of_a_damaged_store_is_a_document(
    runs: dict[str, Tables], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    write_store(runs["slow stage"], str(tmp_path))
    damage(tmp_path)
    found = CliRunner().invoke(stalls, [str(tmp_path), "--json"])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    assert "Traceback" not in found.output
    if found.exit_code in (0, 3, 5):
        told = json.loads(found.stdout)["verdicts"]
        assert {(one["kind"], one.get("on_rank", one.get("rank"))) for one in told if one["kind"] not in QUIET} <= {
            ("stage_limits", 1)
        }


def of_one_rank(tables: Tables) -> Tables:
    there = {"intervals", "health", "summaries"}
    return {name: rows.filter(pc.less(rows["rank"], 1)) if name in there else rows for name, rows in tables.items()}


def of_a_later_version(tables: Tables) -> Tables:
    """Half of the intervals are of a class, and some events of a kind, that nobody here knows."""
    rows, events = tables["intervals"], tables["events"]
    cls = pa.array(np.where(np.arange(rows.num_rows) % 2, 77, np.asarray(rows["cls"])), pa.uint8())
    strange = {**events.to_pylist()[-1], "kind": "of_a_later_version", "row_seq": 10**6}
    return tables | {
        "intervals": rows.set_column(rows.schema.get_field_index("cls"), rows.schema.field("cls"), cls),
        "events": pa.concat_tables([events, pa.Table.from_pylist([strange], schema=events.schema)]),
    }


def without_steps(tables: Tables) -> Tables:
    return tables | {"steps": tables["steps"].slice(0, 0)}


def of_a_clock_that_leapt(_tables: Tables) -> Tables:
    return simulate(replace(RUN, faults=(Fault("clock_jump", 4.0, ms=-5_000.0, host=0),)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (of_one_rank, "no intervals of rank 1 came"),
        (of_a_later_version, "classes that this version does not know"),
        (without_steps, "no traffic was recorded"),
        (of_a_clock_that_leapt, "went back by"),
    ],
)
def test_stalls_of_records_that_say_too_little_is_inconclusive_with_the_reason(
    runs: dict[str, Tables], damage: Callable[[Tables], Tables], reason: str, tmp_path: Path
) -> None:
    write_store(damage(runs["healthy"]), str(tmp_path))
    found = CliRunner().invoke(stalls, [str(tmp_path), "--json"])
    assert found.exit_code in (0, 5), found.output
    (verdict,) = json.loads(found.stdout)["verdicts"]
    assert verdict["kind"] == "inconclusive"
    assert reason in verdict["text"]
