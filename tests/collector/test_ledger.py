"""The rank ledger: one class for each nanosecond, whatever the intervals look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_kit import beat, interval, table

from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.ledger.classes import classify
from insitu_collector.ledger.window import Ledger, rank_ledger

MS = 1_000_000
STAGES = {0: 0, 1: 1}


def sources(ranks: Iterable[int] = (0, 1), boot_id: str = "boot") -> pa.Table:
    return table(
        "sources",
        [
            {"rank": r, "stage": r, "role": "rank", "boot_id": boot_id, "unix_anchor_ns": 0, "mono_anchor_ns": 0}
            for r in ranks
        ],
    )


def ledger(
    intervals: Iterable[dict[str, Any]],
    t0: int,
    t1: int,
    health: Iterable[dict[str, Any]] = (),
    ranks: Iterable[int] = (0, 1),
) -> Ledger:
    return rank_ledger(table("intervals", intervals), table("health", health), sources(ranks), t0, t1)


@pytest.mark.parametrize(
    ("cls", "peer", "rank", "expected"),
    [
        (IntervalClass.COMPUTE, -1, 0, (LedgerClass.COMPUTE, None)),
        (IntervalClass.SAMPLE, -1, 0, (LedgerClass.COMPUTE, None)),
        (IntervalClass.SCHEDULE, -1, 0, (LedgerClass.HOST, None)),
        (IntervalClass.HOST, -1, 0, (LedgerClass.HOST, None)),
        (IntervalClass.GC, -1, 0, (LedgerClass.GC, None)),
        (IntervalClass.COMPILE, -1, 0, (LedgerClass.COMPILE, None)),
        (IntervalClass.COLLECTIVE_WAIT, 1, 0, (LedgerClass.COLLECTIVE, None)),
        (IntervalClass.RECV_WAIT, 0, 1, (LedgerClass.WAIT_UPSTREAM, 0)),
        (IntervalClass.RECV_WAIT, 1, 0, (LedgerClass.WAIT_DOWNSTREAM, 1)),
        (IntervalClass.RECV_WAIT, -1, 0, (LedgerClass.WAIT_UPSTREAM, -1)),
        (IntervalClass.SEND_WAIT, 1, 0, (LedgerClass.WAIT_DOWNSTREAM, 1)),
        (IntervalClass.RECV_XFER, 0, 1, (LedgerClass.TRANSFER, None)),
        (IntervalClass.SEND_XFER, 1, 0, (LedgerClass.TRANSFER, None)),
        (IntervalClass.IDLE, -1, 0, (LedgerClass.NO_DEMAND, None)),
        (77, -1, 0, (LedgerClass.OTHER, None)),
    ],
)
def test_each_interval_class_has_its_ledger_class(
    cls: int, peer: int, rank: int, expected: tuple[LedgerClass, int | None]
) -> None:
    assert classify(cls, peer, rank, STAGES) == expected


def test_a_rank_sums_to_the_window_and_the_rest_is_unrecorded() -> None:
    found = ledger([interval(IntervalClass.COMPUTE, 10, 40), interval(IntervalClass.RECV_WAIT, 40, 70, peer=1)], 0, 100)
    assert [(row.cls, row.ns, row.on_rank) for row in found.rows if row.rank == 0] == [
        (LedgerClass.COMPUTE, 30, None),
        (LedgerClass.WAIT_DOWNSTREAM, 30, 1),
        (LedgerClass.UNRECORDED, 40, None),
    ]
    assert [(row.cls, row.ns) for row in found.rows if row.rank == 1] == [(LedgerClass.UNRECORDED, 100)]


def test_overlapping_intervals_are_counted_once_and_reported() -> None:
    found = ledger([interval(IntervalClass.COMPUTE, 0, 60), interval(IntervalClass.HOST, 50, 80)], 0, 100, ranks=[0])
    assert (found.ns(0, LedgerClass.COMPUTE), found.ns(0, LedgerClass.HOST)) == (60, 20)
    assert found.overlap_ns == {0: 10}


def test_run_queue_delay_moves_out_of_compute_but_never_more_than_was_off_the_core() -> None:
    work = [interval(IntervalClass.COMPUTE, 0, 80 * MS, cpu=50 * MS), interval(IntervalClass.HOST, 80 * MS, 100 * MS)]
    some = ledger(work, 0, 100 * MS, [beat(0, 0), beat(100 * MS, 20 * MS)], [0])
    assert some.ns(0, LedgerClass.CONTENDED) == pytest.approx(20 * MS, abs=2)
    assert some.ns(0, LedgerClass.COMPUTE) == pytest.approx(60 * MS, abs=2)
    most = ledger(work, 0, 100 * MS, [beat(0, 0), beat(100 * MS, 90 * MS)], [0])
    assert most.ns(0, LedgerClass.CONTENDED) == pytest.approx(30 * MS, abs=2)
    assert most.ns(0, LedgerClass.HOST) == 20 * MS


def test_waiting_while_the_first_stage_had_no_work_is_no_demand() -> None:
    found = ledger(
        [interval(IntervalClass.IDLE, 20, 60), interval(IntervalClass.RECV_WAIT, 0, 80, rank=1, peer=0)], 0, 100
    )
    assert found.ns(1, LedgerClass.NO_DEMAND) == 40
    assert found.ns(1, LedgerClass.WAIT_UPSTREAM) == 40


def test_an_interval_open_at_the_last_heartbeat_counts_up_to_it() -> None:
    hang = beat(90, 0, open_cls=int(IntervalClass.COMPUTE), open_since_ns=30, open_peer=-1)
    found = ledger([interval(IntervalClass.HOST, 0, 30)], 0, 100, [beat(10, 0), hang], [0])
    assert found.ns(0, LedgerClass.COMPUTE) == 60
    assert found.ns(0, LedgerClass.UNRECORDED) == 10


def test_times_of_another_host_are_moved_by_its_anchors() -> None:
    rows = [
        {"rank": 0, "stage": 0, "role": "rank", "boot_id": "a", "unix_anchor_ns": 1000, "mono_anchor_ns": 0},
        {"rank": 1, "stage": 1, "role": "rank", "boot_id": "b", "unix_anchor_ns": 1500, "mono_anchor_ns": 0},
    ]
    work = table("intervals", [interval(IntervalClass.COMPUTE, 0, 100, rank=1)])
    found = rank_ledger(work, table("health", []), table("sources", rows), 500, 600)
    assert found.ns(1, LedgerClass.COMPUTE) == 100


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="must not end"):
        ledger([], 10, 0)


stretches = st.lists(
    st.builds(
        interval,
        st.integers(0, 14),
        st.integers(-50, 1000),
        st.integers(-50, 1000),
        rank=st.sampled_from([0, 1]),
        peer=st.integers(-1, 3),
        cpu=st.integers(0, 1200),
    ),
    max_size=30,
)
beats = st.lists(
    st.builds(beat, st.integers(-100, 1100), st.integers(0, 500), rank=st.sampled_from([0, 1])), max_size=8
)
windows = st.tuples(st.integers(-20, 900), st.integers(0, 300)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(stretches, beats, windows)
@settings(max_examples=150, deadline=None)
def test_classes_are_disjoint_and_complete_for_any_intervals(
    rows: list[dict[str, Any]], health: list[dict[str, Any]], window: tuple[int, int]
) -> None:
    found = ledger(rows, *window, health)
    for rank in (0, 1):
        assert found.ns(rank) == window[1] - window[0]
    assert all(row.ns > 0 for row in found.rows)
    places = [(row.rank, row.cls, row.on_rank) for row in found.rows]
    assert len(places) == len(set(places))


@given(stretches, beats, windows, st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_shifting_every_time_changes_nothing(
    rows: list[dict[str, Any]], health: list[dict[str, Any]], window: tuple[int, int], by: int
) -> None:
    moved = [{**row, "t0_ns": row["t0_ns"] + by, "t1_ns": row["t1_ns"] + by} for row in rows]
    later = [{**row, "t_ns": row["t_ns"] + by} for row in health]
    here, there = ledger(rows, *window, health), ledger(moved, window[0] + by, window[1] + by, later)
    assert [(r.rank, r.cls, r.on_rank, r.ns) for r in here.rows] == [
        (r.rank, r.cls, r.on_rank, r.ns) for r in there.rows
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.data())
@settings(max_examples=60, deadline=None)
def test_a_dropped_interval_shows_up_as_unrecorded(lengths: list[int], data: st.DataObject) -> None:
    rows, t = [], 0
    for length in lengths:
        rows.append(interval(IntervalClass.COMPUTE, t, t + length))
        t += length
    kept = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True))
    found = ledger([rows[place] for place in kept], 0, t, ranks=[0])
    assert found.ns(0, LedgerClass.UNRECORDED) == t - sum(lengths[place] for place in kept)
    assert found.overlap_ns == {0: 0}
