"""Messages between driver and ranks, whole and in pieces."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.messages import (
    Failed,
    Frames,
    Idle,
    Ready,
    RowPlan,
    Sampled,
    Sampling,
    StepPlan,
    Stop,
    Stopped,
    ToDriver,
    ToRank,
    Traffic,
    frame,
    to_driver,
    to_rank,
)
from insitu_engine.rank_link import DriverGone, Link

ROW = RowPlan("cmpl-1", 0, 2, 5, "prefill", 0, True, [4, 9], [11, 12], Sampling(0.7, 5, 0.9, 2**61))
PLAN = StepPlan(3, 1, "mixed", 2, 1, [ROW], [7], 2**62, 5, 6)
FOR_RANKS: list[ToRank] = [PLAN, Idle(5), Traffic(60), Stop()]


@given(st.lists(st.integers(1, 30), min_size=1))
def test_messages_survive_any_cut(cuts: list[int]) -> None:
    data = b"".join(frame(message) for message in FOR_RANKS)
    frames, found, at = Frames(to_rank), [], 0
    for size in [*cuts, len(data)]:
        found += list(frames.feed(data[at : at + size]))
        at += size
    assert found == FOR_RANKS


def test_what_ranks_say() -> None:
    said: list[ToDriver] = [
        Ready(12),
        Sampled(1, 0, [5, -1]),
        Failed("no", True),
        Stopped({"epoch": 2**64 - 1, "produced": {"a": 1}}),
    ]
    data = b"".join(frame(message) for message in said)
    assert list(Frames(to_driver).feed(data)) == said


def test_a_link_reads_until_the_driver_is_gone() -> None:
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    ours.sendall(frame(PLAN) + frame(Stop()))
    assert link.read() == PLAN
    assert link.read() == Stop()
    link.send(Ready(1))
    assert list(Frames(to_driver).feed(ours.recv(100))) == [Ready(1)]
    ours.close()
    with pytest.raises(DriverGone):
        link.read()
    with pytest.raises(DriverGone):
        link.send(Ready(1))
    theirs.close()


def test_half_a_message_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(frame(PLAN)[:9])
    ours.close()
    with pytest.raises(DriverGone):
        Link(theirs).read()
    theirs.close()
