"""Spans: the intervals of ranks as they are drawn, and fewer of them where a pixel holds many."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.ledger.classes import PLACE
from insitu_collector.views.spans import CLASSES, MOST_SPANS, Spans, fitted, lanes_of, merged_by_pixel, spans_of

Row = tuple[int, int, int, IntervalClass, int]
STAGES = {0: 0, 1: 1}


def table(rows: list[Row]) -> pa.Table:
    """rank, t0, t1, cls, peer"""
    full = [
        {"epoch": 1, "rank": rank, "stage": rank, "row_seq": place, "t0_ns": t0, "t1_ns": t1, "cls": int(cls)}
        | {"peer": peer, "step_id": place, "mb": 0}
        for place, (rank, t0, t1, cls, peer) in enumerate(rows)
    ]
    return pa.Table.from_pylist(full, schema=schema_of("intervals"))


def drawn(rows: list[Row]) -> list[tuple[int, int, str]]:
    found = spans_of(table(rows), Timeline(), STAGES)
    return [(lane, t0, str(CLASSES[cls])) for lane, t0, cls in zip(found.lane, found.t0_ns, found.cls, strict=True)]


def test_spans_come_by_begin_in_lanes_of_ranks() -> None:
    found = drawn([(1, 50, 60, IntervalClass.COMPUTE, -1), (0, 10, 20, IntervalClass.SAMPLE, -1)])
    assert found == [(0, 10, "compute"), (1, 50, "compute")]
    assert lanes_of({5: 1, 2: 0, 3: 1}) == [2, 3, 5]


def test_a_wait_says_whom_it_waits_for_by_its_class() -> None:
    found = drawn([(1, 0, 9, IntervalClass.RECV_WAIT, 0), (0, 1, 9, IntervalClass.RECV_WAIT, 1)])
    assert found == [(0 + 1, 0, "wait_upstream"), (0, 1, "wait_downstream")]


def test_a_wait_for_work_while_there_was_none_is_no_demand() -> None:
    idle = (0, 0, 100, IntervalClass.IDLE, -1)
    assert drawn([idle, (1, 0, 90, IntervalClass.RECV_WAIT, 0)])[1] == (1, 0, "no_demand")
    assert drawn([idle, (1, 0, 900, IntervalClass.RECV_WAIT, 0)])[1] == (1, 0, "wait_upstream")


def test_rows_of_no_rank_are_not_drawn() -> None:
    assert drawn([(-1, 0, 5, IntervalClass.COMPUTE, -1)]) == []


@st.composite
def some_spans(draw: st.DrawFn) -> Spans:
    """Disjoint spans of a few lanes, by begin."""
    rows = []
    for lane in range(draw(st.integers(1, 3))):
        t = draw(st.integers(0, 50))
        for _ in range(draw(st.integers(0, 25))):
            length, gap = draw(st.integers(1, 120)), draw(st.integers(0, 20))
            rows.append((lane, t, t + length, draw(st.integers(0, len(CLASSES) - 1))))
            t += length + gap
    rows.sort(key=lambda row: row[1])
    lanes, begins, ends, classes = np.array(rows, np.int64).reshape(-1, 4).T
    zeros = np.zeros(len(rows), np.int64)
    return Spans(lanes, begins, ends, classes, zeros, zeros, zeros, np.ones(len(rows), np.int64))


@given(spans=some_spans(), pixel_ns=st.integers(1, 100))
def test_merging_loses_no_interval_and_no_long_span(spans: Spans, pixel_ns: int) -> None:
    found = merged_by_pixel(spans, pixel_ns)
    assert found.merged.sum() == len(spans)
    assert (np.diff(found.t0_ns) >= 0).all()
    long_before = {(a, b) for a, b in zip(spans.t0_ns.tolist(), spans.t1_ns.tolist(), strict=True) if b - a >= pixel_ns}
    assert long_before <= set(zip(found.t0_ns.tolist(), found.t1_ns.tolist(), strict=True))
    if len(spans):
        assert found.t0_ns.min() == spans.t0_ns.min()
        assert found.t1_ns.max() == spans.t1_ns.max()


def test_a_pixel_shows_the_class_that_took_most_of_it() -> None:
    spans = spans_of(
        table(
            [
                (0, 0, 10, IntervalClass.HOST, -1),
                (0, 10, 50, IntervalClass.COMPUTE, -1),
                (0, 50, 60, IntervalClass.HOST, -1),
            ]
        ),
        Timeline(),
        STAGES,
    )
    found = merged_by_pixel(spans, 1000)
    assert found.cls.tolist() == [PLACE[LedgerClass.COMPUTE]]
    assert (found.t0_ns.tolist(), found.t1_ns.tolist(), found.merged.tolist()) == ([0], [60], [3])
    assert found.step.tolist() == [-1]


@pytest.mark.parametrize("pixels", [100, 1000])
def test_an_answer_stays_small_however_long_the_window(pixels: int) -> None:
    rows = [(0, 10 * n, 10 * n + 9, IntervalClass.COMPUTE, -1) for n in range(3 * MOST_SPANS)]
    spans = spans_of(table(rows), Timeline(), STAGES)
    found = fitted(spans, 0, 10 * len(rows), pixels)
    assert len(found) <= min(MOST_SPANS, 4 * pixels)
    assert found.merged.sum() == len(rows)
    assert fitted(found, 0, 10 * len(rows), pixels) is found
    fewer = fitted(spans, 0, 10 * len(rows), pixels, most=50)
    assert (len(fewer) <= 50, fewer.merged.sum()) == (True, len(rows))
