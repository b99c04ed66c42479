"""One run as it grows: tiles settle when every rank has reported, late rows change them, what is missing is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.ledger.classes import PLACE
from insitu_collector.rows.slices import Groups, seconds
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate
from insitu_dashboard.run_view import LATE_NS, RunView

_row_seq = itertools.count(10**6)


def beat(rank: int, t_ns: int, **columns: Any) -> pa.Table:
    row = {"epoch": 1 + rank, "rank": rank, "stage": rank, "row_seq": next(_row_seq), "t_ns": t_ns, "closing": False}
    return pa.Table.from_pylist([row | columns], schema=schema_of("health"))


def took(view: RunView, rank: int, cls: LedgerClass, t0_ns: int, num_s: int = 1) -> int:
    """What a rank spent in a class in some whole seconds."""
    times = view.times_between(t0_ns, t0_ns + num_s * SECOND)
    assert len(times.t0_ns) == num_s
    return int(times.ns[:, view.lanes.index(rank), PLACE[cls]].sum())


def every_second(view: RunView) -> Int64:
    return view.times_between(0, 2**62).ns


def only(tables: dict[str, pa.Table], rank: int, column: str, before_ns: int) -> dict[str, pa.Table]:
    """The tables without what a rank has reported from a time on."""
    found = dict(tables)
    for name, of in (("intervals", column), ("health", "t_ns")):
        rows = tables[name]
        found[name] = rows.filter(pc.or_(pc.not_equal(rows["rank"], rank), pc.less(rows[of], before_ns)))
    return found


def test_rows_that_come_second_by_second_give_the_same_tiles_as_all_at_once(
    tables: dict[str, pa.Table], view: RunView
) -> None:
    live = RunView()
    for part in seconds(tables):
        live.add(part)
        live.settle()
    assert np.array_equal(every_second(live), every_second(view))
    assert len(every_second(live)) > 10
    assert (every_second(live).sum(axis=2) == SECOND).all()


def test_wide_tiles_and_the_seconds_around_them_are_the_same_time(view: RunView) -> None:
    begin, end = 1001 * SECOND, 1013 * SECOND
    narrow, wide = view.times_between(begin, end), view.times_between(begin, end, 10 * SECOND)
    assert len(narrow.t0_ns) == 12
    assert len(view.times_between(begin - SECOND, end, 10 * SECOND).t0_ns) == 4
    assert np.array_equal(narrow.ns.sum(axis=0), wide.ns.sum(axis=0))


def test_the_slow_stage_is_seen_in_the_tiles(view: RunView) -> None:
    assert view.settled_ns is not None
    end = view.settled_ns // SECOND * SECOND
    slow = took(view, 0, LedgerClass.WAIT_DOWNSTREAM, end - 4 * SECOND, 4) / (4 * SECOND)
    healthy = took(view, 0, LedgerClass.WAIT_DOWNSTREAM, end - 12 * SECOND, 3) / (3 * SECOND)
    assert slow > 0.4 > healthy


def test_no_tile_is_made_of_a_second_that_a_rank_has_not_reported(tables: dict[str, pa.Table]) -> None:
    view, until = RunView(), 1005 * SECOND + 1
    view.add(only(only(tables, 0, "t1_ns", until + 2 * SECOND), 1, "t1_ns", until))
    view.settle()
    assert view.settled_ns is not None and until - SECOND < view.settled_ns < until
    assert view.times_between(0, 2**62).t1_ns.max() <= view.settled_ns


def test_a_rank_that_fell_silent_does_not_hold_the_picture_up(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    view.add(only(tables, 1, "t1_ns", 1003 * SECOND))
    view.settle()
    assert view.settled_ns is not None and view.settled_ns > 1010 * SECOND
    assert took(view, 1, LedgerClass.UNRECORDED, 1004 * SECOND, 6) == 6 * SECOND
    assert not view.is_closed


def test_a_row_that_comes_late_changes_the_tile_it_belongs_to(tables: dict[str, pa.Table]) -> None:
    cut = 1006 * SECOND
    rows = tables["intervals"]
    is_late = pc.and_(
        pc.equal(rows["rank"], 1), pc.and_(pc.greater(rows["t1_ns"], cut), pc.less(rows["t0_ns"], cut + SECOND))
    )
    view = RunView()
    view.add({**tables, "intervals": rows.filter(pc.invert(is_late))})
    view.settle()
    before = took(view, 1, LedgerClass.UNRECORDED, cut)
    view.add({"intervals": rows.filter(is_late)})
    view.settle()
    assert took(view, 1, LedgerClass.UNRECORDED, cut) < before / 2


def test_what_a_rank_that_was_cut_off_for_a_minute_sends_is_still_drawn(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    view.add(only(tables, 1, "t1_ns", 1006 * SECOND))
    view.add({"health": beat(0, 1066 * SECOND)})
    view.settle()
    assert took(view, 1, LedgerClass.UNRECORDED, 1007 * SECOND) == SECOND
    rows = tables["intervals"].filter(pc.equal(tables["intervals"]["rank"], 1))
    view.add({"intervals": rows.filter(pc.greater(rows["t1_ns"], 1006 * SECOND))})
    view.settle()
    assert took(view, 1, LedgerClass.UNRECORDED, 1007 * SECOND) < SECOND // 2


def test_what_comes_when_its_tile_is_final_is_counted_and_changes_nothing(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    view.add(only(tables, 1, "t1_ns", 1006 * SECOND))
    view.add({"health": pa.concat_tables([beat(rank, 1007 * SECOND + LATE_NS) for rank in (0, 1)])})
    view.settle()
    rows = tables["intervals"].filter(pc.equal(tables["intervals"]["rank"], 1))
    late = rows.filter(pc.and_(pc.greater(rows["t0_ns"], 1006 * SECOND), pc.less(rows["t1_ns"], 1007 * SECOND)))
    view.add({"intervals": late})
    view.settle()
    assert took(view, 1, LedgerClass.UNRECORDED, 1006 * SECOND) == SECOND
    assert view.ledger.late.num_rows == late.num_rows > 0


def test_a_rank_that_was_restarted_goes_on_in_its_lane(tables: dict[str, pa.Table], view: RunView) -> None:
    gone, back = 1006 * SECOND, 1007 * SECOND
    before, after = only(tables, 1, "t1_ns", gone), {}
    for name, column in (("intervals", "t0_ns"), ("health", "t_ns")):
        rows = tables[name].filter(pc.and_(pc.equal(tables[name]["rank"], 1), pc.greater(tables[name][column], back)))
        after[name] = rows.set_column(0, rows.schema.field("epoch"), pa.array([50] * rows.num_rows, pa.uint64()))
    (source,) = (row for row in tables["sources"].to_pylist() if row["rank"] == 1)
    after["sources"] = pa.Table.from_pylist([source | {"epoch": 50}], schema=schema_of("sources"))
    restarted = RunView()
    restarted.add(before)
    restarted.settle()
    restarted.add(after)
    restarted.settle()
    assert restarted.lanes == [0, 1]
    assert took(restarted, 1, LedgerClass.UNRECORDED, gone) == SECOND
    for cls in (LedgerClass.WAIT_UPSTREAM, LedgerClass.UNRECORDED):
        assert took(restarted, 1, cls, back + SECOND, 4) == took(view, 1, cls, back + SECOND, 4)


def test_each_replica_has_its_own_tiles() -> None:
    slow = Fault("slow", 1.0, 1, replica=1, ms=20.0)
    views = []
    for tables in Groups().sort(simulate(Scenario(seed=4, seconds=10.0, replicas=2, faults=(slow,)))).values():
        views.append(RunView())
        views[-1].add(tables)
        views[-1].settle()
    assert [view.lanes for view in views] == [[0, 1], [2, 3]]
    assert all((every_second(view).sum(axis=2) == SECOND).all() for view in views)
    waited = [every_second(view)[-5:, 0, PLACE[LedgerClass.WAIT_DOWNSTREAM]].sum() for view in views]
    assert waited[1] > 1.5 * waited[0]


def test_a_hang_is_seen_while_it_lasts() -> None:
    tables = simulate(Scenario(seed=1, seconds=10.0, faults=(Fault("hang", 4.0, 1, ms=5000.0),)))
    view = RunView()
    for part in seconds(tables):
        view.add(part)
        found = [each for each in view.open_intervals() if each.rank == 1]
        if found:
            break
    assert found[0].cls is IntervalClass.COMPUTE
    assert " s in compute" in found[0].text


def test_a_wait_says_whom_for() -> None:
    view = RunView()
    view.add({"sources": simulate(Scenario(seconds=1.0))["sources"]})
    waiting = {"open_cls": int(IntervalClass.RECV_WAIT), "open_since_ns": 10 * SECOND, "open_peer": 1}
    view.add({"health": beat(0, 22 * SECOND, **waiting)})
    assert [each.text for each in view.open_intervals()] == ["waiting 12.0 s for rank 1"]
    idle = {"open_cls": int(IntervalClass.IDLE), "open_since_ns": 10 * SECOND}
    view.add({"health": pa.concat_tables([beat(0, 23 * SECOND, **idle), beat(1, 23 * SECOND, **waiting)])})
    assert view.open_intervals() == [], "rank 1 waits for work, and nobody has any"


def test_what_was_dropped_is_counted_and_marked_where_it_happened(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    view.add(tables)
    assert (view.missing(), list(view.lost)) == ({}, [])
    lost = [{"table": "intervals", "reason": "queue_full", "rows": 120}]
    view.add({"health": beat(1, 1020 * SECOND)})
    view.add({"health": beat(1, 1021 * SECOND, dropped=lost)})
    assert view.missing() == {"queue_full": 120}
    (gap,) = view.lost
    assert (gap.rank, gap.t0_ns, gap.t1_ns) == (1, 1020 * SECOND, 1021 * SECOND)
    assert "120 queue_full" in gap.text


def test_what_the_store_lost_counts_too(view: RunView) -> None:
    row = {
        "epoch": 500,
        "rank": -1,
        "stage": -1,
        "row_seq": 0,
        "source_epoch": 2,
        "num_rows": 33,
        "reason": "torn_tail",
    }
    of_another = row | {"source_epoch": 12345, "row_seq": 1}
    view.take_gaps(pa.Table.from_pylist([row, of_another], schema=schema_of("gaps")))
    assert view.missing() == {"torn_tail": 33}


def test_a_run_is_over_when_every_rank_says_so(view: RunView) -> None:
    assert not view.is_closed
    view.add({"health": beat(0, 1100 * SECOND, closing=True)})
    assert not view.is_closed
    view.add({"health": beat(1, 1100 * SECOND, closing=True)})
    assert view.is_closed


def test_overhead_is_what_the_probe_took_of_the_time_with_work() -> None:
    view = RunView()
    tables = simulate(Scenario(seed=2, seconds=8.0))
    view.add({name: rows for name, rows in tables.items() if name != "health"})
    begin, end = 1002 * SECOND, 1008 * SECOND
    for rank in (0, 1):
        view.add({"health": beat(rank, begin, hook_ns=0, drain_cpu_ns=0)})
        view.add({"health": beat(rank, end, hook_ns=20_000_000 * (rank + 1), drain_cpu_ns=10_000_000)})
    view.settle()
    idle = sum(took(view, 1, cls, begin, 6) for cls in (LedgerClass.NO_DEMAND, LedgerClass.UNRECORDED))
    assert view.overhead() == pytest.approx(50_000_000 / (6 * SECOND - idle))


def test_an_empty_view_answers_everything() -> None:
    view = RunView()
    view.settle()
    assert (view.last_ns, view.settled_ns, view.model, view.overhead()) == (None, None, None, None)
    assert (view.lanes, every_second(view).size) == ([], 0)
    assert not view.is_closed
