"""Clocks that leapt, as heartbeats tell: of one process or of all of a host, and never because a heartbeat was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.beats import Beat, beat_of
from insitu_collector.clocks.leaps import LEAP_NS, doubtful, forget, leaps, lived, newest_ns

S = 1_000_000_000
BASE: dict[str, Any] = dict.fromkeys(
    ("cpu_ns", "run_delay_ns", "host_busy_ns", "host_cores", "open_cls", "open_since_ns", "open_step_id", "open_peer")
)


def beat(t_ns: int, seq: int, *, epoch: int = 1, boot: str = "a", line_ns: int = 0, **more: Any) -> Beat:
    row = BASE | {"t_ns": t_ns, "row_seq": seq, "epoch": epoch, "rank": epoch - 1, "stage": 0, "num_steps": 0}
    return beat_of(row | {"dropped": None, "closing": False} | more, boot, t_ns + line_ns)


def process(times_s: Sequence[float], epoch: int = 1, boot: str = "a", line_ns: int = 0) -> list[Beat]:
    return [beat(int(t * S), seq, epoch=epoch, boot=boot, line_ns=line_ns) for seq, t in enumerate(times_s)]


@given(st.lists(st.integers(0, LEAP_NS), max_size=30), st.randoms())
def test_heartbeats_that_come_as_they_do_are_no_leap(gaps: list[int], random: Any) -> None:
    held = [beat(sum(gaps[:n]), n) for n in range(len(gaps) + 1)]
    random.shuffle(held)
    assert leaps({1: held}) == []


def test_heartbeats_that_got_lost_are_no_leap() -> None:
    assert leaps({1: [beat(0, 0), beat(9 * S, 9), beat(10 * S, 10)]}) == []


@pytest.mark.parametrize("by_s", [-5.0, -1.5, 4.0, 86_400.0])
def test_a_clock_that_leapt_is_told_with_when_and_by_how_much(by_s: float) -> None:
    times = [10, 11, 12 + by_s, 13 + by_s]
    found, again = leaps({epoch: process(times, epoch, line_ns=7 * S) for epoch in (1, 2)})
    assert (found.epoch, again.epoch) == (1, 2)
    assert (found.t0_ns, found.t1_ns, found.went_back) == (18 * S, int((19 + by_s) * S), by_s < 0)
    how = f"went back by about {-by_s:.1f} s" if by_s < 0 else f"leapt by about {by_s:.1f} s, or all of that host stood"
    assert how in found.told("h")


def test_one_process_that_stood_still_while_another_of_its_host_went_on_is_not_the_hosts_clock() -> None:
    alone, still = process([0.5, 1.5, 2.5, 3.5, 9.0], 2), process([0, 1, 7, 8])
    (leap,) = leaps({1: still, 2: process([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], 2)})
    assert leap.epoch == 1 and not leap.is_shared
    assert doubtful([leap], "a", 0) is None
    assert {leap.is_shared for leap in leaps({1: still, 3: process(range(9), 3, "another host")})} == {True}
    both = leaps({1: process([0, 1, 7, 8]), 2: process([0.5, 1.5, 7.5], 2)})
    assert [leap.is_shared for leap in both] == [True, True]
    assert doubtful(both, "a", 0) == both[-1] and doubtful(both, "a", 8 * S) is None and doubtful(both, "b", 0) is None
    assert [(leap.epoch, leap.is_shared) for leap in leaps({2: alone})] == [(2, False)]


def test_a_process_alone_on_its_host_may_have_stood_still_by_itself() -> None:
    """A drain thread that waits for a disk for some seconds, say; what is open there is open."""
    found = leaps({1: process([0, 1, 7, 8])})
    assert [leap.is_shared for leap in found] == [False] and doubtful(found, "a", 0) is None
    hung = beat(8 * S, 3, open_cls=int(IntervalClass.COMPUTE), open_step_id=3, open_since_ns=S)
    assert lived(hung, found) == hung
    died = {1: process([0, 1, 7, 8]), 2: process([-9, -8], 2)}
    assert [leap.is_shared for leap in leaps(died)] == [False], "that one was gone before"
    beside = {1: process([0, 1, 7, 8]), 3: process(range(9), 3, "another host")}
    (leap,) = leaps(beside)
    assert doubtful([leap], "a", 0) == leap and "or its process stood still" in leap.told("h")


def test_what_is_open_over_a_leap_has_been_open_for_what_was_lived_through() -> None:
    found = leaps({1: process([0, 1, 7, 8]), 2: process([0.5, 1.5, 7.5], 2)})
    open_: dict[str, Any] = {"open_cls": int(IntervalClass.COMPUTE), "open_step_id": 3}
    last = beat(8 * S, 3, open_since_ns=S // 2, **open_)
    assert last.t_ns - last.open_since_ns == 8 * S - S // 2
    assert last.t_ns - lived(last, found).open_since_ns == 8 * S - S // 2 - 5 * S
    began_after = beat(8 * S, 3, open_since_ns=7 * S + S // 2, **open_)
    assert lived(began_after, found) == began_after
    elsewhere = beat(8 * S, 3, boot="b", open_since_ns=0, **open_)
    assert lived(elsewhere, found) == elsewhere
    assert lived(beat(8 * S, 3), found).open_cls is None


def test_what_is_open_over_two_leaps_is_less_by_both() -> None:
    times = [0, 1, 7, 8, 14]
    found = leaps({epoch: process(times, epoch) for epoch in (1, 2)})
    last = beat(14 * S, 4, open_cls=int(IntervalClass.COMPUTE), open_step_id=3, open_since_ns=S // 2)
    assert last.t_ns - lived(last, found).open_since_ns == 14 * S - S // 2 - 10 * S


@pytest.mark.parametrize(
    ("times", "other", "newest"),
    [
        ([0, 1, 3602, 3603], [0, 1, 2, 3], 3),
        ([0, 1, 3602, 3603], [-99, -98], 3603),
        ([0, 1, 2, 3], [0, 1, -98, -97], 3),
        ([0, 1, -98, -97], [0, 1, -98, -96], -96),
    ],
    ids=["leapt ahead", "the other died before", "the other went back", "both went back"],
)
def test_now_is_the_newest_heartbeat_of_a_clock_that_did_not_leap_ahead(
    times: list[float], other: list[float], newest: int
) -> None:
    held = {1: process(times), 2: process(other, 2, "b")}
    assert newest_ns(held, leaps(held)) == newest * S
    assert newest_ns({}, []) is None


@given(st.lists(st.integers(0, LEAP_NS), max_size=30), st.integers(-S, 40 * S))
def test_heartbeats_before_a_time_are_forgotten_but_the_one_before_it_and_the_last(gaps: list[int], t_ns: int) -> None:
    every = [beat(sum(gaps[:n]), n) for n in range(len(gaps) + 1)]
    held, heard = {1: deque(every)}, {1: every[-1].t_ns}
    forget(held, heard, t_ns)
    older = [one for one in every if one.t_ns < t_ns]
    assert list(held[1]) == [*older[-1:], *(one for one in every if one.t_ns >= t_ns)]


@pytest.mark.parametrize("by_s", [-100.0, 3600.0])
def test_a_leap_is_remembered_for_as_long_as_its_process_lives_after_it(by_s: float) -> None:
    held: dict[int, deque[Beat]] = {1: deque()}
    heard: dict[int, int] = {}
    seen = []
    for n in range(90):
        held[1].append(beat(int((n + (by_s if n >= 10 else 0)) * S), n))
        heard[1] = n * S  # the others' clock
        forget(held, heard, (n - 60) * S)
        seen.append(bool(leaps(held)))
    assert seen == [False] * 10 + [True] * 61 + [False] * 19


@pytest.mark.parametrize(("more", "is_kept"), [({}, True), ({"closing": True}, False), ({"rank": -1}, False)])
def test_the_last_heartbeat_of_a_rank_is_kept_until_it_closes_or_another_takes_its_place(
    more: dict[str, Any], is_kept: bool
) -> None:
    held = {1: deque([beat(0, 0, **more)]), 2: deque([beat(99 * S, 0, epoch=2)])}
    heard = {1: 0, 2: 99 * S}
    forget(held, heard, 39 * S)
    assert (1 in held) is (1 in heard) is is_kept
    held[3], heard[3] = deque([beat(99 * S, 0, epoch=3, rank=0)]), 99 * S
    forget(held, heard, 39 * S)
    assert sorted(held) == sorted(heard) == [2, 3]
