"""Flows: which interval handed work to which."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.export.flows import Flows, Intervals, handovers, ids_back

C = IntervalClass
STAGES = {0: 0, 1: 1}
Row = tuple[int, int, int, IntervalClass, int, int]
"""rank, t0, t1, class, step, peer"""


def columns(rows: list[Row]) -> Intervals:
    rank, t0, t1, cls, step, peer = np.array([[int(v) for v in row] for row in rows], np.int64).reshape(-1, 6).T
    return Intervals(rank, t0, t1, cls, step, peer)


def pairs(flows: Flows) -> list[tuple[int, int]]:
    return list(zip(flows.source.tolist(), flows.sink.tolist(), strict=True))


def steps(rows: list[tuple[int, int, int, list[tuple[str, int]]]]) -> pa.Table:
    """step, mb, t0, [(request, sample_row)]"""
    full = [
        {"epoch": 1, "rank": 0, "stage": 0, "row_seq": n, "step_id": step, "mb": mb, "t0_ns": t0}
        | {"rows": [{"request": name, "sample_row": place, "row": 0, "count": 1} for name, place in entries]}
        for n, (step, mb, t0, entries) in enumerate(rows)
    ]
    return pa.Table.from_pylist(full, schema=schema_of("steps"))


def test_a_pause_that_split_a_send_or_cut_a_receive_short_loses_no_flow() -> None:
    split: list[Row] = [
        (0, 10, 11, C.SEND_XFER, 7, 1),
        (0, 11, 20, C.GC, 7, -1),
        (0, 20, 21, C.SEND_XFER, 7, 1),
        (1, 0, 12, C.RECV_WAIT, 7, 0),
    ]
    assert pairs(handovers(columns(split), STAGES)) == [(0, 3)]
    cut: list[Row] = [
        (0, 30, 31, C.SEND_XFER, 7, 1),
        (1, 0, 12, C.RECV_WAIT, 7, 0),
        (1, 12, 40, C.GC, 7, -1),
        (1, 40, 50, C.COMPUTE, 7, -1),
    ]
    assert pairs(handovers(columns(cut), STAGES)) == [(0, 2)]


def test_the_send_meets_the_last_receive_of_the_same_step_and_peer() -> None:
    rows: list[Row] = [
        (0, 0, 9, C.COMPUTE, 7, -1),
        (0, 9, 11, C.SEND_WAIT, 7, 1),
        (0, 11, 12, C.SEND_XFER, 7, 1),
        (0, 12, 13, C.SEND_XFER, 8, 1),
        (1, 0, 11, C.RECV_WAIT, 7, 0),
        (1, 11, 14, C.RECV_XFER, 7, 0),
    ]
    assert pairs(handovers(columns(rows), STAGES)) == [(2, 5)]


def test_without_a_recorded_send_the_last_work_on_the_step_is_the_source() -> None:
    rows: list[Row] = [(0, 0, 9, C.COMPUTE, 7, -1), (0, 9, 10, C.HOST, 7, -1), (1, 0, 14, C.RECV_WAIT, 7, 0)]
    assert pairs(handovers(columns(rows), STAGES)) == [(0, 2)]


def test_what_the_driver_sent_or_a_rank_of_the_same_or_a_later_stage_is_no_handover() -> None:
    rows: list[Row] = [
        (0, 0, 9, C.COMPUTE, 7, -1),
        (1, 0, 9, C.COMPUTE, 7, -1),
        (2, 0, 9, C.COMPUTE, 7, -1),
        (1, 9, 10, C.RECV_XFER, 7, -1),
        (1, 10, 11, C.RECV_WAIT, 7, 2),
        (0, 9, 10, C.RECV_WAIT, 7, 1),
        (1, 11, 12, C.RECV_WAIT, 7, 99),
    ]
    assert pairs(handovers(columns(rows), {0: 0, 1: 1, 2: 1})) == []


def test_a_receive_that_ended_before_its_send_began_is_counted_and_not_drawn() -> None:
    rows: list[Row] = [(0, 50, 60, C.SEND_XFER, 7, 1), (1, 0, 14, C.RECV_WAIT, 7, 0)]
    found = handovers(columns(rows), STAGES)
    assert (len(found), found.num_against_clock) == (0, 1)


def test_sampled_ids_go_back_where_the_next_step_of_the_slot_goes_on_with_them() -> None:
    rows: list[Row] = [
        (0, 0, 5, C.COMPUTE, 0, -1),
        (1, 5, 9, C.SAMPLE, 0, -1),
        (0, 5, 8, C.COMPUTE, 1, -1),
        (1, 9, 12, C.SAMPLE, 1, -1),
        (0, 9, 10, C.RECV_WAIT, 2, 1),
        (0, 10, 14, C.COMPUTE, 2, -1),
        (0, 14, 18, C.COMPUTE, 3, -1),
    ]
    of = [(0, 0, 0, [("a", 0)]), (1, 1, 5, [("b", 0)]), (2, 0, 10, [("a", 0)]), (3, 1, 14, [("c", 0)])]
    assert pairs(ids_back(columns(rows), steps(of), Timeline(), STAGES)) == [(1, 4)]
    unsampled = [(0, 0, 0, [("a", -1)]), (2, 0, 10, [("a", 0)])]
    assert pairs(ids_back(columns(rows), steps(unsampled), Timeline(), STAGES)) == []
    assert pairs(ids_back(columns(rows), steps(of), Timeline(), {0: 0, 1: 0})) == [], "one stage hands nothing back"


def test_the_sink_is_the_first_interval_of_a_step_that_received_nothing() -> None:
    rows: list[Row] = [
        (1, 0, 9, C.COMPUTE, 0, -1),
        (0, 8, 9, C.HOST, 1, -1),
        (0, 9, 12, C.COMPUTE, 1, -1),
    ]
    of = [(0, 0, 0, [("a", 0)]), (1, 0, 8, [("a", 0)])]
    assert pairs(ids_back(columns(rows), steps(of), Timeline(), STAGES)) == [(0, 1)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 50),
            st.integers(0, 50),
            st.sampled_from(list(C)),
            st.integers(-1, 4),
            st.integers(-1, 4),
        ),
        max_size=60,
    )
)
def test_every_flow_joins_one_step_of_two_stages_forward_in_time(
    drawn: list[tuple[int, int, int, IntervalClass, int, int]],
) -> None:
    stages = {0: 0, 1: 0, 2: 1, 3: 2}
    rows = columns([(rank, t0, t0 + length, cls, step, peer) for rank, t0, length, cls, step, peer in drawn])
    found = handovers(rows, stages)
    seen = set()
    for source, sink in pairs(found):
        assert rows.step[source] >= 0 and (rows.cls[sink] == C.GC or rows.step[source] == rows.step[sink])
        assert stages[int(rows.rank[source])] < stages[int(rows.rank[sink])]
        is_pause = rows.cls[sink] == C.GC
        assert is_pause or rows.peer[sink] == rows.rank[source]
        assert rows.t0_ns[source] <= rows.t1_ns[sink]
        seen.add((int(rows.step[source]), int(rows.rank[sink]), int(rows.rank[source])))
    assert len(seen) == len(found), "one flow a step, rank and peer"
