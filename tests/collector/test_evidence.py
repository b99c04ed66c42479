"""Evidence: rows of the recent past, bounded, on one timeline; and what is said of the host and of lost rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu_collector.clocks.timeline import timeline_of
from insitu_collector.evidence import HORIZON_NS, Evidence
from insitu_collector.rows.slices import Groups, seconds
from insitu_collector.rows.tape import Tape
from insitu_collector.simulate import Scenario, simulate
from insitu_collector.steps.times import step_times
from insitu_collector.verdicts import host

S = 1_000_000_000


def table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    full = [{"epoch": row["rank"] + 10, "stage": row["rank"], "row_seq": n, **row} for n, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema_of(name))


def source(rank: int, role: str = "rank", boot_id: str = "b", unix: int = 0, **more: Any) -> dict[str, Any]:
    row = {"rank": rank, "role": role, "boot_id": boot_id, "unix_anchor_ns": unix, "mono_anchor_ns": 0}
    return {**row, "run": "r", "replica": 0, **more}


def test_memory_is_bounded_to_the_horizon() -> None:
    evidence = Evidence()
    tables = simulate(Scenario(seed=0, seconds=4.0))
    evidence.add(tables)
    held = len(evidence.intervals.between(0)["t"])
    later = evidence.now_ns + 2 * HORIZON_NS
    evidence.add({"health": table("health", [{"rank": 0, "t_ns": later}])})
    assert held > 1000
    assert len(evidence.intervals.between(0)["t"]) == 0
    assert {len(beats) for beats in evidence.beats.values()} == {1}, "each rank's last: it may be dead"


def test_a_step_has_the_shape_its_row_map_says() -> None:
    evidence = Evidence()
    entries = [
        {"request": "a", "row": 0, "count": 5, "position": 0, "phase": 0, "sample_row": 0},
        {"request": "b", "row": 5, "count": 1, "position": 9, "phase": 1, "sample_row": 1},
        {"request": "c", "row": 6, "count": 3, "position": 10, "phase": 0, "sample_row": -1},
    ]
    step = {"rank": 0, "step_id": 3, "t0_ns": S, "num_rows": 9, "phase": 2, "rows": entries}
    evidence.add({"sources": table("sources", [source(0)]), "steps": table("steps", [step])})
    found = {name: column[0] for name, column in evidence.steps.between(0).items()}
    assert (found["num_rows"], found["prefill_rows"], found["num_sampled"], found["num_requests"]) == (9, 8, 2, 3)
    assert found["context"] == (1 + 2 + 3 + 4 + 5) + 10 + (11 + 12 + 13)
    assert not found["warmup"]
    assert evidence.requests_of(3, {"tokens": {4, 7}}) == (("a", "c"), {0})
    assert evidence.requests_of(3, {"samples": {1}}) == (("b",), {1})
    assert evidence.requests_between(0, 2 * S) == ("a", "b", "c")


def test_steps_that_came_before_the_end_of_warmup_was_known_become_warmup() -> None:
    evidence = Evidence()
    step = {"rank": 0, "step_id": 3, "t0_ns": S, "num_rows": 9, "rows": None}
    evidence.add({"sources": table("sources", [source(0)]), "steps": table("steps", [step])})
    before = evidence.traffic_ns
    assert before == (S, S)
    evidence.add({"events": table("events", [{"rank": -1, "t_ns": 2 * S, "kind": "warmup_end"}])})
    assert evidence.traffic_ns is None
    assert evidence.is_warmup(evidence.steps.between(0)).tolist() == [True]


def test_requests_are_open_until_they_end() -> None:
    evidence = Evidence()
    rows = [("a", 0), ("b", 0), ("warmup-1", 0), ("a", 7), ("c", 0), ("c", 8)]
    events = [{"rank": -1, "request": name, "event": event, "t_ns": n} for n, (name, event) in enumerate(rows)]
    evidence.add({"requests": table("requests", events)})
    assert evidence.open_requests == {"b": 1}


def test_busy_time_of_a_step_is_what_the_generator_recorded() -> None:
    tables = simulate(Scenario(seed=2, seconds=3.0))
    evidence = Evidence()
    evidence.add(tables)
    rows = [row for row in tables["intervals"].to_pylist() if row["rank"] == 1 and row["cls"] in (4, 6, 7)]
    busy: dict[int, int] = {}
    for row in rows:
        busy[row["step_id"]] = busy.get(row["step_id"], 0) + row["t1_ns"] - row["t0_ns"]
    found = step_times(evidence, 0)[1]
    assert len(found) == len(busy) - 2  # the last two may be unfinished
    assert found.busy_ns.tolist() == [float(busy[step]) for step in found.step.tolist()]
    assert (np.diff(found.t_ns) > 0).all()


@given(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=8), st.integers(0, 100), st.integers(0, 100))
def test_a_tape_gives_back_what_lies_between(chunks: list[list[int]], t0: int, t1: int) -> None:
    tape = Tape(value=int)
    for chunk in chunks:
        tape.add(t=np.array(chunk, np.int64), value=np.array(chunk, np.int64) * 2)
    every = [t for chunk in chunks for t in chunk]
    assert tape.between(t0, t1)["value"].tolist() == [2 * t for t in every if t0 <= t < t1]
    tape.trim(t0)
    assert tape.between(t0)["t"].tolist() == [t for t in every if t >= t0]
    tape.trim(t0, t1)
    assert tape.between(t0)["t"].tolist() == [t for t in every if t0 <= t < t1]


def test_hosts_are_put_on_the_clock_of_the_first() -> None:
    rows = [source(0, boot_id="a", unix=100), source(1, boot_id="b", unix=160), source(2, boot_id="a", unix=103)]
    clock = timeline_of(table("sources", rows))
    beats = table("health", [{"rank": rank, "t_ns": 1000} for rank in (0, 1, 2)])
    assert clock.moved(beats, "t_ns").tolist() == [1000, 1060, 1000]
    assert clock.unix_ns(1000) == 1100


def test_seconds_give_every_row_once_and_in_time() -> None:
    tables = simulate(Scenario(seed=1, seconds=3.0))
    parts = list(seconds(tables))
    for name, rows in tables.items():
        assert sum(part[name].num_rows for part in parts if name in part) == rows.num_rows
    ends = [part["intervals"]["t1_ns"].to_numpy() for part in parts if "intervals" in part]
    assert all(before.max() < after.min() for before, after in pairwise(ends))


def test_a_process_without_ranks_belongs_to_every_replica_of_its_run() -> None:
    rows = [source(0, replica=0), {**source(0, replica=1), "epoch": 77}, source(-1, role="driver")]
    beats = [{"rank": -1, "t_ns": 5}, {"rank": 0, "t_ns": 5}, {"rank": 0, "t_ns": 6, "epoch": 77}]
    found = Groups().sort({"sources": table("sources", rows), "health": table("health", beats)})
    assert {group: sorted(tables["health"]["epoch"].to_pylist()) for group, tables in found.items()} == {
        ("r", 0): [9, 10],
        ("r", 1): [9, 77],
    }


def test_what_a_driver_says_before_any_rank_waits_for_the_first_one() -> None:
    groups = Groups()
    driver = {"sources": table("sources", [source(-1, role="driver")]), "health": table("health", [beat(-1, 1)])}
    assert groups.sort(driver) == {}
    found = groups.sort({"sources": table("sources", [source(0)]), "health": table("health", [beat(0, 2)])})
    assert epochs(found, "sources") == epochs(found, "health") == {("r", 0): [9, 10]}


def test_a_replica_that_begins_later_is_told_who_the_driver_is_and_each_source_once() -> None:
    groups = Groups()
    groups.sort({"sources": table("sources", [source(-1, role="driver"), source(0, replica=0)])})
    later = {**source(0, replica=1), "epoch": 77}
    found = groups.sort({"sources": table("sources", [later]), "health": table("health", [beat(-1, 5)])})
    assert epochs(found, "sources") == {("r", 1): [9, 77]}
    assert epochs(found, "health") == {("r", 0): [9], ("r", 1): [9]}


def test_a_driver_that_spoke_first_on_a_host_with_another_clock_takes_no_time_of_the_run_back() -> None:
    hour, groups, evidence = 3_600 * S, Groups(), Evidence()
    groups.sort({"sources": table("sources", [source(-1, role="driver")])})
    ahead = source(1, boot_id="ahead by an hour", mono_anchor_ns=hour)
    worked = {"rank": 1, "cls": 0, "t0_ns": hour + S, "t1_ns": hour + 2 * S}
    ranks = {
        "sources": table("sources", [ahead, source(0)]),
        "intervals": table("intervals", [worked]),
        "health": table("health", [beat(-1, S)]),
    }
    [tables] = groups.sort(ranks).values()
    evidence.add(tables)
    assert evidence.now_ns == 2 * S, "by the clock of the first host"


def beat(rank: int, t_ns: int) -> dict[str, Any]:
    return {"rank": rank, "t_ns": t_ns}


def epochs(found: Mapping[tuple[str, int], Mapping[str, pa.Table]], name: str) -> dict[tuple[str, int], list[int]]:
    return {group: sorted(tables[name]["epoch"].to_pylist()) for group, tables in found.items() if name in tables}


def loaded(run_delay_share: float, foreign_cores: float, seconds_: int = 6) -> Evidence:
    """One rank that uses half a core of two, beside foreign work."""
    evidence = Evidence()
    beats = [
        {
            "rank": 0,
            "t_ns": t * S,
            "cpu_ns": t * S // 2,
            "run_delay_ns": int(t * S * run_delay_share),
            "host_busy_ns": int(t * S * (0.5 + foreign_cores)),
            "host_cores": 2,
        }
        for t in range(seconds_)
    ]
    evidence.add({"sources": table("sources", [source(0)]), "health": table("health", beats)})
    return evidence


@pytest.mark.parametrize(
    ("delay", "foreign", "told"), [(0.3, 1.2, True), (0.3, 0.2, False), (0.05, 1.2, False), (0.0, 0.0, False)]
)
def test_contention_needs_both_a_waiting_rank_and_foreign_work(delay: float, foreign: float, told: bool) -> None:
    found = host.contended(loaded(delay, foreign))
    assert bool(found) is told
    if told:
        assert "1.2 of 2 cores" in found[0].text
        assert "rank 0 30 %" in found[0].text


def test_contention_that_was_told_stands_until_it_is_clearly_less() -> None:
    assert not host.contended(loaded(0.12, 0.4))
    assert host.contended(loaded(0.12, 0.4), already=True)


def test_dropped_rows_are_told_with_their_reason_and_when_they_last_grew() -> None:
    counts = [0, 0, 3, 3, 9, 9]
    beats = [
        {"rank": 1, "t_ns": t * S, "dropped": [{"table": "intervals", "reason": "ring_full", "rows": rows}]}
        for t, rows in enumerate(counts)
    ]
    beats.append({"rank": 0, "t_ns": 6 * S, "dropped": [{"table": "health", "reason": "shutdown", "rows": 1}]})
    evidence = Evidence()
    evidence.add({"sources": table("sources", [source(0), source(1)]), "health": table("health", beats)})
    (found,) = host.dropped(evidence)
    assert (found.on_rank, found.t0_ns, found.t1_ns, found.size) == (1, 2 * S, 4 * S, 9.0)
    assert "9 of intervals (ring_full)" in found.text


def of_two_hosts(ahead_s: int) -> Evidence:
    """A rank each, of 10 s, compared at 0; the second's clock leaps after 5 s."""
    evidence = Evidence()
    evidence.add({"sources": table("sources", [source(0, boot_id="a"), source(1, boot_id="b")]), "clocks": clocks(0)})
    for n in range(10):
        second(evidence, n, ahead_s * (n >= 5))
    return evidence


def second(evidence: Evidence, n: int, ahead_s: int) -> None:
    t_ns = [n * S, (n + ahead_s) * S]
    health = [{"rank": rank, "t_ns": t_ns[rank], "row_seq": n} for rank in (0, 1)]
    intervals = [{"rank": rank, "cls": 4, "t0_ns": t_ns[rank] - S, "t1_ns": t_ns[rank]} for rank in (0, 1)]
    evidence.add({"health": table("health", health), "intervals": table("intervals", intervals)})


def clocks(at_s: int, ahead_s: int = 0) -> pa.Table:
    row = {"host_a": "a", "host_b": "b", "t_ns": (at_s + ahead_s) * S, "offset_ns": ahead_s * S, "error_ns": 1000}
    return table("clocks", [{"rank": 1, **row}])


@pytest.mark.parametrize("ahead_s", [-3600, -100, 100, 3600])
def test_now_is_that_of_the_clock_that_did_not_leap_and_its_rows_are_kept(ahead_s: int) -> None:
    evidence = of_two_hosts(ahead_s)
    assert evidence.now_ns == 9 * S
    evidence.add({"clocks": clocks(10, ahead_s)})
    for n in range(11, 80):
        second(evidence, n, ahead_s)
        assert evidence.now_ns == n * S
    rows = evidence.intervals.between(0)
    assert [int((rows["rank"] == rank).sum()) for rank in (0, 1)] == [61, 61]
    assert {len(beats) for beats in evidence.beats.values()} == {62}


def test_now_is_right_once_a_host_that_believed_another_wall_clock_is_measured() -> None:
    evidence = Evidence()
    evidence.add({"sources": table("sources", [source(0, boot_id="a"), source(1, boot_id="b", unix=3600 * S)])})
    for n in range(5):
        second(evidence, n, 0)
    assert evidence.now_ns == 3604 * S
    evidence.add({"clocks": clocks(5)})
    assert evidence.now_ns == 4 * S
    assert evidence.last_beats()[1].t_ns == 4 * S


def test_what_stood_still_on_one_host_does_not_move_now() -> None:
    """A process that is stopped for 30 s while another one dies."""
    evidence = Evidence()
    evidence.add({"sources": table("sources", [source(0), source(1)])})
    for n, t in enumerate([*range(5), *range(35, 40)]):
        beats = [{"rank": rank, "t_ns": t * S, "row_seq": n} for rank in (0, 1) if rank == 0 or n < 5]
        evidence.add({"health": table("health", beats)})
        assert evidence.now_ns == t * S
