"""How far a stream has come: an acknowledgement never covers a frame that is not stored and may still come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.service.progress import HOLE_S, StreamProgress


def test_frames_in_order_are_received_then_durable() -> None:
    progress = StreamProgress()
    assert (progress.received, progress.durable) == (-1, -1)
    progress.take(0)
    progress.take(1)
    assert (progress.received, progress.durable) == (1, -1)
    progress.commit(0)
    assert (progress.received, progress.durable) == (1, 0)
    assert 1 in progress
    assert 2 not in progress


def test_a_frame_out_of_order_waits_for_those_before_it() -> None:
    progress = StreamProgress()
    for seq in (0, 2):
        progress.take(seq)
        progress.commit(seq)
    assert not progress.close_old_holes(10.0) or progress.durable == 0
    progress.take(1)
    assert (progress.received, progress.durable) == (2, 0)
    progress.commit(1)
    assert progress.durable == 2


def test_a_hole_that_stays_is_given_up_and_its_frame_still_taken_when_it_comes() -> None:
    progress = StreamProgress()
    progress.take(500)
    progress.commit(500)
    assert progress.close_old_holes(10.0)
    progress.close_old_holes(10.0 + HOLE_S * 0.9)
    assert progress.durable == -1
    progress.close_old_holes(10.0 + HOLE_S)
    assert progress.durable == 500
    assert 7 not in progress
    progress.take(7)
    assert (progress.received, progress.durable) == (7, 6), "not durable yet, so not covered, nor what may follow it"
    progress.commit(7)
    assert progress.durable == 7
    progress.close_old_holes(20.0)
    progress.close_old_holes(20.0 + HOLE_S)
    assert progress.durable == 500
    assert not progress.close_old_holes(99.0)


def test_frames_that_failed_below_a_durable_one_are_awaited_for_as_long_as_nothing_comes() -> None:
    progress = StreamProgress()
    for seq in range(4):
        progress.take(seq)
    progress.commit(0)
    progress.commit(3)
    for seq in (1, 2):
        progress.fail(seq)
    for now_s in (10.0, 10.0 + HOLE_S, 99.0):
        assert progress.close_old_holes(now_s)
        assert (progress.received, progress.durable) == (0, 0), "its sender would forget what was lost"
    progress.take(4)
    progress.commit(4)
    progress.close_old_holes(100.0)
    progress.close_old_holes(100.0 + HOLE_S)
    assert progress.durable == 4, "a sender that goes on behind them has given them up"


def test_a_sender_that_comes_back_after_a_hole_was_given_up_has_no_frame_of_it_passed() -> None:
    progress = StreamProgress()
    for seq in (0, 4):
        progress.take(seq)
        progress.commit(seq)
    progress.close_old_holes(10.0)
    progress.close_old_holes(10.0 + HOLE_S)
    assert progress.durable == 4
    for seq in (1, 2, 3):
        progress.take(seq)
        progress.commit(seq)
        assert progress.durable == (4 if seq == 3 else seq), "the next one is on its way"


def test_a_frame_refused_for_good_is_passed_and_one_that_failed_is_not() -> None:
    progress = StreamProgress()
    progress.skip(0)
    for seq in (1, 2):
        progress.take(seq)
    progress.commit(2)
    progress.fail(1)
    assert (progress.received, progress.durable) == (0, 0)
    assert 1 not in progress
    progress.take(1)
    progress.commit(1)
    assert progress.durable == 2


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_in_any_order_an_acknowledgement_covers_only_what_is_stored(order: list[int], committed: set[int]) -> None:
    progress = StreamProgress()
    for number, seq in enumerate(order):
        progress.take(seq)
        if seq in committed:
            progress.commit(seq)
        taken = set(order[: number + 1])
        assert set(range(progress.received + 1)) <= taken
        assert set(range(progress.durable + 1)) <= taken & committed
    assert progress.received == 7
