"""Intervals are exclusive whatever is nested, turned, dropped or struck by a collection."""

import threading
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from insitu.session.intervals import BYTES, CLS, CPU, T0, T1, WIDTH, Recorder, Rows64, carve
from insitu.vocabulary import IntervalClass


def disjoint(rows: Rows64) -> bool:
    return all(a[T1] <= b[T0] for a, b in pairwise(rows))


def test_an_inner_interval_takes_its_time_from_the_outer() -> None:
    recorder = Recorder()
    with recorder.interval("host", 7, 1, -1, 0), recorder.interval("compute", 7, 1, -1, 0):
        pass
    rows = recorder.take()
    assert rows[:, CLS].tolist() == [IntervalClass.HOST, IntervalClass.COMPUTE, IntervalClass.HOST]
    assert disjoint(rows)
    assert rows[0, T1] == rows[1, T0]
    assert rows[1, T1] == rows[2, T0], "nothing is lost between an interval and the one around it"


def test_turn_splits_at_the_senders_stamp() -> None:
    recorder = Recorder()
    with recorder.interval("recv_wait", 1, 0, 0, 0) as interval:
        stamp = interval.t0_ns + 1
        interval.turn("recv_xfer", stamp, num_bytes=64)
    wait, transfer = recorder.take()
    assert (wait[CLS], transfer[CLS]) == (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)
    assert wait[T1] == transfer[T0] == stamp
    assert transfer[BYTES] == 64


def test_a_stamp_outside_the_wait_is_clamped() -> None:
    recorder = Recorder()
    with recorder.interval("recv_wait", 1, 0, 0, 0) as interval:
        interval.turn("recv_xfer", 5)
    (row,) = recorder.take()
    assert row[CLS] == IntervalClass.RECV_XFER, "sent before the receive was posted: all of it is transfer"


def test_another_thread_records_nothing() -> None:
    recorder = Recorder()
    with recorder.interval("host", -1, -1, -1, 0):

        def foreign() -> None:
            with recorder.interval("compute", -1, -1, -1, 0) as interval:
                interval.turn("host")

        thread = threading.Thread(target=foreign)
        thread.start()
        thread.join()
    assert [int(row[CLS]) for row in recorder.take()] == [IntervalClass.HOST]
    assert recorder.num_foreign == 1


def test_a_full_ring_counts_the_newest_rows() -> None:
    recorder = Recorder(capacity=4)
    for number in range(7):
        recorder.write(number, number + 1, 4, number, 0, -1, 0, 0)
    assert recorder.take()[:, T0].tolist() == [0, 1, 2, 3]
    assert recorder.num_lost == 3
    recorder.write(9, 10, 4, 9, 0, -1, 0, 0)
    assert recorder.take()[:, T0].tolist() == [9], "room again after the drain took the rows"


def test_the_open_interval_is_visible_while_it_lasts() -> None:
    recorder = Recorder()
    with recorder.interval("recv_wait", 3, 1, 2, 0):
        top = recorder.open
        assert top is not None
        assert (top.cls, top.step_id, top.peer) == (IntervalClass.RECV_WAIT, 3, 2)
    assert recorder.open is None


spans = st.lists(st.integers(1, 50), min_size=2, max_size=24).map(
    lambda steps: np.cumsum(steps)[: len(steps) // 2 * 2].reshape(-1, 2)
)


@given(spans, spans)
def test_carving_gives_every_pause_its_time_and_loses_none(intervals: Rows64, pauses: Rows64) -> None:
    rows = np.zeros((len(intervals), WIDTH), np.int64)
    rows[:, [T0, T1]] = intervals
    rows[:, CLS] = IntervalClass.COMPUTE
    rows[:, BYTES] = 10
    rows[:, CPU] = rows[:, T1] - rows[:, T0]
    on_core = (pauses[:, 1] - pauses[:, 0]) // 2
    carved = carve(rows, np.column_stack([pauses, on_core]))
    assert disjoint(carved)
    collected = carved[carved[:, CLS] == IntervalClass.GC]
    assert np.array_equal(collected[:, [T0, T1]], pauses)
    assert np.array_equal(collected[:, CPU], on_core)
    instants = [t for a, b in intervals for t in range(a, b) if not any(p <= t < q for p, q in pauses)]
    rest = carved[carved[:, CLS] == IntervalClass.COMPUTE]
    assert [t for row in rest for t in range(row[T0], row[T1])] == instants
    assert (rest[:, CPU] <= rest[:, T1] - rest[:, T0]).all()
