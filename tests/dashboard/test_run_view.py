"""One run as it grows: tiles settle when every rank has reported, late rows change them, what is missing is known."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate
from insitu_collector.slices import seconds
from insitu_dashboard.run_view import RunView
from insitu_dashboard.tiles import TILE_NS, Tile

_row_seq = itertools.count(10**6)


def beat(rank: int, t_ns: int, **columns: Any) -> pa.Table:
    row = {"epoch": 1 + rank, "rank": rank, "stage": rank, "row_seq": next(_row_seq), "t_ns": t_ns, "closing": False}
    return pa.Table.from_pylist([row | columns], schema=schema_of("health"))


def test_rows_that_come_second_by_second_give_the_same_tiles_as_all_at_once(
    tables: dict[str, pa.Table], view: RunView
) -> None:
    live = RunView()
    for part in seconds(tables):
        live.add(part)
        live.settle()
    assert live.tiles == view.tiles
    assert len(live.tiles) > 10
    for each in live.tiles.values():
        assert all(sum(classes.values()) == TILE_NS for classes in each.ns.values())


def test_the_slow_stage_is_seen_in_the_tiles(view: RunView) -> None:
    end = view.settled_ns
    assert end is not None

    def share(tiles: list[Tile], rank: int, cls: LedgerClass) -> float:
        return sum(each.ns[rank].get(cls, 0) for each in tiles) / (len(tiles) * TILE_NS)

    slow, healthy = view.tiles_between(end - 5 * SECOND, end), view.tiles_between(end - 12 * SECOND, end - 9 * SECOND)
    assert share(slow, 0, LedgerClass.WAIT_DOWNSTREAM) > 0.4 > share(healthy, 0, LedgerClass.WAIT_DOWNSTREAM)


def test_no_tile_is_made_of_a_second_that_a_rank_has_not_reported(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    is_second = pc.equal(tables["health"]["rank"], 1)
    late = tables["health"].filter(is_second)
    few = late.slice(0, 4)
    others = (
        tables["health"]
        .filter(pc.invert(is_second))
        .filter(pc.less(tables["health"].filter(pc.invert(is_second))["t_ns"], few["t_ns"][3].as_py() + 2 * SECOND))
    )
    view.add({**tables, "health": pa.concat_tables([others, few])})
    view.settle()
    assert view.settled_ns == few["t_ns"][3].as_py()
    assert max(view.tiles) + TILE_NS <= few["t_ns"][3].as_py()


def test_a_rank_that_fell_silent_does_not_hold_the_picture_up(tables: dict[str, pa.Table]) -> None:
    view = RunView()
    first = pc.or_(pc.not_equal(tables["health"]["rank"], 1), pc.less(tables["health"]["t_ns"], 1003 * SECOND))
    view.add({**tables, "health": tables["health"].filter(first)})
    view.settle()
    assert view.settled_ns is not None and view.settled_ns > 1010 * SECOND
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
    before = view.tiles[cut].ns[1][LedgerClass.UNRECORDED]
    view.add({"intervals": rows.filter(is_late)})
    view.settle()
    assert view.tiles[cut].ns[1].get(LedgerClass.UNRECORDED, 0) < before / 2


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


def test_overhead_is_what_the_probe_took_of_compute_and_host() -> None:
    view = RunView()
    tables = simulate(Scenario(seed=2, seconds=8.0))
    view.add({name: rows for name, rows in tables.items() if name != "health"})
    begin, end = 1002 * SECOND, 1008 * SECOND
    for rank in (0, 1):
        view.add({"health": beat(rank, begin, hook_ns=0, drain_cpu_ns=0)})
        view.add({"health": beat(rank, end, hook_ns=20_000_000 * (rank + 1), drain_cpu_ns=10_000_000)})
    view.settle()
    busy = sum(
        each.ns[1].get(cls, 0)
        for each in view.tiles_between(begin, end)
        for cls in (LedgerClass.COMPUTE, LedgerClass.HOST)
    )
    assert view.overhead() == pytest.approx(50_000_000 / busy)


def test_an_empty_view_answers_everything() -> None:
    view = RunView()
    view.settle()
    assert (view.last_ns, view.settled_ns, view.model, view.overhead(), view.tiles) == (None, None, None, None, {})
    assert not view.is_closed
