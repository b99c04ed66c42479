"""Rows of the recent past: what touches a window, and what is forgotten."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu_collector.clocks.timeline import Timeline
from insitu_dashboard import recent_rows
from insitu_dashboard.recent_rows import RecentRows


def intervals(spans: list[tuple[int, int]]) -> pa.Table:
    rows = [
        {"epoch": 1, "rank": 0, "stage": 0, "row_seq": place, "t0_ns": t0, "t1_ns": t1, "cls": 4}
        for place, (t0, t1) in enumerate(spans)
    ]
    return pa.Table.from_pylist(rows, schema=schema_of("intervals"))


def recent(keep_ns: int = 10**9) -> RecentRows:
    return RecentRows("intervals", "t0_ns", "t1_ns", keep_ns)


spans = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 200)).map(lambda s: (s[0], s[0] + s[1])), max_size=30)


@given(polls=st.lists(spans, max_size=4), begin=st.integers(0, 1200), length=st.integers(1, 300))
def test_a_window_gets_exactly_the_rows_that_touch_it(
    polls: list[list[tuple[int, int]]], begin: int, length: int
) -> None:
    rows = recent()
    for poll in polls:
        rows.add(intervals(poll), Timeline())
    found = rows.between(begin, begin + length)
    touching = [span for poll in polls for span in poll if span[0] < begin + length and span[1] > begin]
    assert sorted(zip(found["t0_ns"].to_pylist(), found["t1_ns"].to_pylist(), strict=True)) == sorted(touching)


def test_old_rows_are_forgotten_and_the_base_stays() -> None:
    rows = recent(keep_ns=100)
    assert (rows.since_ns, rows.last_ns, rows.base_ns) == (None, None, None)
    rows.add(intervals([(0, 10)]), Timeline())
    rows.add(intervals([(500, 510)]), Timeline())
    assert (rows.since_ns, rows.last_ns, rows.base_ns) == (500, 510, 0)
    assert rows.between(0, 600).num_rows == 1


def test_a_long_history_read_at_once_is_forgotten_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_rows, "PIECE_ROWS", 10)
    rows = recent(keep_ns=300)
    rows.add(intervals([(t, t + 1) for t in range(999, -1, -1)]), Timeline())
    assert rows.since_ns is not None and 680 <= rows.since_ns <= 700
    assert rows.between(990, 1001).num_rows == 10


def test_memory_is_bounded_by_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_rows, "MOST_ROWS", 25)
    rows = recent()
    for begin in range(0, 100, 10):
        rows.add(intervals([(t, t + 1) for t in range(begin, begin + 10)]), Timeline())
    assert rows.between(0, 1000).num_rows == 20


def test_times_of_another_host_are_moved_onto_one_line() -> None:
    rows = recent()
    rows.add(intervals([(0, 10)]), Timeline(offset_ns={1: 1000}))
    assert rows.between(0, 500).num_rows == 0
    assert rows.between(1000, 1001).num_rows == 1
