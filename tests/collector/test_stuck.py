"""Verdict `stuck`: the chain of who waits for whom ends at the rank that stopped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from record_kit import table

from insitu.vocabulary import IntervalClass
from insitu_collector.evidence import Evidence
from insitu_collector.verdicts import stuck
from insitu_collector.verdicts.finding import Finding

S = 1_000_000_000
MS = 1_000_000
NOW = 100 * S
COMPUTE, RECV, SEND, IDLE = (
    IntervalClass.COMPUTE,
    IntervalClass.RECV_WAIT,
    IntervalClass.SEND_WAIT,
    IntervalClass.IDLE,
)


def beat(
    rank: int, cls: int | None, open_s: float = 0, peer: int = -1, *, ago_s: float = 0, **more: Any
) -> dict[str, Any]:
    t = NOW - int(ago_s * S)
    row = {"rank": rank, "t_ns": t, "closing": False, **more}
    if cls is not None:
        row |= {"open_cls": int(cls), "open_since_ns": t - int(open_s * S), "open_peer": peer, "open_step_id": 7}
    return row


def evidence(
    beats: Iterable[dict[str, Any]], *, num_ranks: int = 3, median_ms: float = 10, boots: str = "bbb"
) -> Evidence:
    """Ranks whose every class took `median_ms` often before, and their heartbeats."""
    sources = [
        {"rank": r, "role": "rank", "boot_id": boots[r], "unix_anchor_ns": 0, "mono_anchor_ns": 0}
        for r in range(num_ranks)
    ]
    usual = [
        {"rank": rank, "cls": int(cls), "t0_ns": 50 * S + n * S, "t1_ns": 50 * S + n * S + int(median_ms * MS)}
        for rank in range(num_ranks)
        for cls in IntervalClass
        for n in range(12)
    ]
    found = Evidence()
    found.add({"sources": table("sources", sources), "intervals": table("intervals", usual)})
    found.add({"health": table("health", beats)})
    return found


def look(beats: Iterable[dict[str, Any]], **more: Any) -> list[Finding]:
    return stuck.look(evidence(beats, **more))


def test_the_rank_that_waits_for_nobody_is_named_with_those_who_wait() -> None:
    (found,) = look([beat(0, RECV, 4.0, 2), beat(1, SEND, 4.1, 2), beat(2, COMPUTE, 4.2)])
    assert (found.on_rank, found.on_stage, found.step_id) == (2, 2, 7)
    assert "rank 0 waits 4.0 s for it, rank 1 waits 4.1 s for it" in found.text
    assert found.t0_ns == NOW - int(4.2 * S)


def test_a_chain_of_waits_is_followed_to_its_end() -> None:
    (found,) = look([beat(0, SEND, 3.0, 1), beat(1, SEND, 3.1, 2), beat(2, IntervalClass.SAMPLE, 3.2)])
    assert found.on_rank == 2


@pytest.mark.parametrize(
    "beats",
    [
        [beat(0, IDLE, 30), beat(1, RECV, 30, 0), beat(2, RECV, 30, 1)],
        [beat(0, RECV, 30, -1), beat(1, RECV, 30, 0), beat(2, RECV, 30, 1)],
        [beat(0, RECV, 1.5, 2), beat(1, RECV, 1.5, 0), beat(2, COMPUTE, 1.5)],
        [beat(0, RECV, 2.1, 1), beat(1, COMPUTE, 0.3), beat(2, RECV, 2.1, 1)],
        [beat(0, RECV, 2.1, 1), beat(1, RECV, 0.01, 0, ago_s=0.5), beat(2, RECV, 0.2, 1)],
        [beat(0, IntervalClass.COMPILE, 60), beat(1, RECV, 60, 0), beat(2, RECV, 60, 1)],
        [beat(0, COMPUTE, 9, closing=True), beat(1, None), beat(2, None)],
    ],
    ids=["idle", "driver", "too short", "root just began", "ring of two moments", "compiling", "closed"],
)
def test_what_only_looks_stuck_is_not_told(beats: list[dict[str, Any]]) -> None:
    assert look(beats) == []


MEET = IntervalClass.COLLECTIVE_WAIT


def test_who_is_not_in_the_collective_of_its_stage_is_the_one_that_hangs() -> None:
    (found,) = look([beat(0, MEET, 4, stage=0), beat(1, COMPUTE, 4.1, stage=0), beat(2, RECV, 4, 0)])
    assert found.on_rank == 1
    assert "in compute of step 7 (non-communication hang)" in found.text
    assert "rank 0 waits 4.0 s for it, rank 2 waits 4.0 s for it" in found.text


def test_a_rank_of_the_stage_that_waits_itself_passes_the_blame_on() -> None:
    (found,) = look([beat(0, COMPUTE, 5), beat(1, MEET, 4, stage=1), beat(2, RECV, 4.1, 0, stage=1)])
    assert found.on_rank == 0


def test_a_collective_that_all_are_in_is_a_hang_of_communication_at_the_last_to_come() -> None:
    (found,) = look([beat(0, MEET, 4, stage=0), beat(1, MEET, 3, stage=0), beat(2, RECV, 4, 1)])
    assert found.on_rank == 1
    assert "in collective_wait of step 7 (communication hang)" in found.text


def test_a_slow_class_needs_twenty_medians() -> None:
    slow = [beat(0, RECV, 3, 1), beat(1, COMPUTE, 3), beat(2, RECV, 3, 1)]
    assert look(slow, median_ms=200) == []
    assert [found.on_rank for found in look(slow, median_ms=100)] == [1]


def test_a_first_use_gets_more_time() -> None:
    hung = [beat(0, COMPUTE, 5)]
    fresh = Evidence()
    sources = [{"rank": 0, "role": "rank", "boot_id": "b", "unix_anchor_ns": 0, "mono_anchor_ns": 0}]
    fresh.add({"sources": table("sources", sources), "health": table("health", hung)})
    assert stuck.look(fresh) == []


def test_a_rank_that_stands_still_in_no_interval_is_found_by_who_waits() -> None:
    (found,) = look([beat(0, RECV, 4, 1), beat(1, None), beat(2, RECV, 4, 1)])
    assert found.on_rank == 1
    assert "in no interval" in found.text


def test_a_ring_names_who_stopped_first() -> None:
    (found,) = look([beat(0, SEND, 5, 1), beat(1, SEND, 4, 0), beat(2, RECV, 4, 1)])
    assert found.on_rank == 0


def test_a_rank_that_fell_silent_is_stuck_with_that_phase() -> None:
    (found,) = look([beat(0, RECV, 3.4, 1), beat(1, COMPUTE, 0.1, ago_s=3.5), beat(2, RECV, 3.4, 1)])
    assert (found.on_rank, found.phase) == (1, "silent")
    assert "rank 0 waits 3.4 s for it" in found.text


XFER = IntervalClass.RECV_XFER


@pytest.mark.parametrize(
    ("receiver", "heard", "is_silent"),
    [
        (0, {"cls": int(XFER)}, False),
        (0, {"cls": int(RECV), "bytes": 8}, False),
        (0, {"cls": int(RECV), "step_id": 7}, False),
        (0, {"cls": int(RECV)}, True),
        (3, {"cls": int(XFER)}, True),
    ],
    ids=["transfer", "bytes", "wait of a step", "poll", "another host"],
)
def test_who_was_heard_by_a_rank_of_its_host_is_not_silent(
    receiver: int, heard: dict[str, Any], is_silent: bool
) -> None:
    """Its own rows may be on their way still, or lost: a collector stood still. Rank 3 has a clock of its own."""
    found = evidence([beat(0, RECV, 0.1, 1), beat(1, COMPUTE, 0.1, ago_s=3.5), beat(2, RECV, 0.1, 1)])
    other = {"rank": 3, "role": "rank", "boot_id": "c", "unix_anchor_ns": 0, "mono_anchor_ns": 0}
    row = {"rank": receiver, "peer": 1, "t0_ns": NOW - S, "t1_ns": NOW - S // 2, **heard}
    found.add({"sources": table("sources", [other]), "intervals": table("intervals", [row])})
    found.add({"health": table("health", [beat(3, COMPUTE, 0.1)])})
    assert [finding.on_rank for finding in stuck.look(found)] == ([1] if is_silent else [])


def test_a_rank_that_is_asked_again_and_again_for_one_step_is_not_heard() -> None:
    found = evidence([beat(0, RECV, 0.1, 1), beat(1, COMPUTE, 0.1, ago_s=9), beat(2, IDLE, 9)])
    polls = [
        {"rank": 0, "cls": int(RECV), "peer": 1, "step_id": 7, "t0_ns": NOW - n * S, "t1_ns": NOW - n * S + S}
        for n in range(9, 0, -1)
    ]
    found.add({"intervals": table("intervals", polls)})
    assert [finding.on_rank for finding in stuck.look(found)] == [1]


@pytest.mark.parametrize("after_s", [4, 61, 600])
def test_a_rank_that_died_stays_silent_and_its_victim_is_not_named(after_s: int) -> None:
    found = evidence([], num_ranks=2, boots="bb")
    said = []
    for at in range(after_s + 1):
        rows = [beat(0, RECV, at, 1, ago_s=-at, row_seq=at)] + ([beat(1, COMPUTE, 0.1, row_seq=0)] if not at else [])
        found.add({"health": table("health", rows)})
        said.append([(one.on_rank, one.phase) for one in stuck.look(found)])
    assert said == [[]] * 3 + [[(1, "silent")]] * (after_s - 2)
    assert len(found.beats[2]) == 1 and len(found.beats[1]) <= 62


def test_who_waits_for_a_rank_of_which_nothing_is_known_is_not_the_one_that_stands_still() -> None:
    assert look([beat(0, RECV, 30, 1), beat(2, RECV, 30, 0)]) == []


def of_process(rank: int, times_s: Iterable[float], **last: Any) -> list[dict[str, Any]]:
    """Heartbeats of which none was lost, seconds after `NOW`; the last says what is open."""
    rows = [{"rank": rank, "row_seq": n, "t_ns": NOW + int(t * S), "closing": False} for n, t in enumerate(times_s)]
    return [*rows[:-1], rows[-1] | last]


def open_for(cls: int, seconds_: float, at_s: float, peer: int = -1) -> dict[str, Any]:
    since = NOW + int((at_s - seconds_) * S)
    return {"open_cls": int(cls), "open_since_ns": since, "open_peer": peer, "open_step_id": 7}


def judged(boots: str, *processes: list[dict[str, Any]]) -> list[Finding]:
    """What is said of ranks of two hosts or one."""
    return look([row for rows in processes for row in rows], num_ranks=2, boots=boots)


@pytest.mark.parametrize("by_s", [5, 21])
@pytest.mark.parametrize("boots", ["bb", "bc"])
def test_what_is_open_when_the_clock_leaps_is_not_stuck(by_s: float, boots: str) -> None:
    """All processes of the host leap: of one host both, of two the second."""
    leapt = [0, 1, 2, 3 + by_s]
    other = leapt if boots == "bb" else [0, 1, 2, 3]
    idle = {"open_cls": int(IDLE), "open_since_ns": NOW, "open_peer": -1}
    hung = open_for(COMPUTE, by_s + 25.5, 3 + by_s)
    assert [one.on_rank for one in judged(boots, of_process(0, other, **idle), of_process(1, leapt, **hung))] == [1]
    open_ = open_for(COMPUTE, by_s + 0.5, 3 + by_s)
    assert judged(boots, of_process(0, other, **idle), of_process(1, leapt, **open_)) == []


@pytest.mark.parametrize("by_s", [-30, -5, 5, 30])
@pytest.mark.parametrize("boots", ["bb", "bc"])
def test_nobody_is_silent_beside_a_process_whose_clock_leapt(by_s: float, boots: str) -> None:
    idle = {"open_cls": int(IDLE), "open_since_ns": NOW - 99 * S, "open_peer": -1}
    leapt = [*range(5), *(n + by_s for n in range(5, 10))]
    assert judged(boots, of_process(0, range(10), **idle), of_process(1, leapt, **idle)) == []


def test_a_rank_that_stops_while_others_of_its_host_go_on_is_silent_as_ever() -> None:
    idle = {"open_cls": int(IDLE), "open_since_ns": NOW - 99 * S, "open_peer": -1}
    (found,) = judged("bb", of_process(0, range(10), **idle), of_process(1, range(6), **idle))
    assert (found.on_rank, found.phase) == (1, "silent")


def test_a_rank_that_closed_is_not_silent() -> None:
    assert look([beat(0, IDLE, 1), beat(1, None, ago_s=9, closing=True), beat(2, IDLE, 1)]) == []


def of_hosts(one: Iterable[float], other: Iterable[float], compared_s: Iterable[float] = ()) -> list[list[int | None]]:
    """Who is named in each second of two hosts, a rank each. compared_s: when the second's clock was, found equal."""
    found = evidence([], num_ranks=2, boots="bc")
    idle = {"open_cls": int(IDLE), "open_since_ns": NOW - 99 * S, "open_peer": -1}
    health = [[row | idle for row in of_process(rank, times)] for rank, times in enumerate((one, other))]
    clocks: list[dict[str, Any]] = [
        {"rank": 1, "host_a": "b", "host_b": "c", "t_ns": NOW + int(t * S), "offset_ns": 0, "error_ns": 1000}
        for t in compared_s
    ]
    said = []
    for n in range(max(map(len, health))):
        rows = [each[n] for each in health if n < len(each)]
        there = [row for row in clocks if NOW + (n - 1) * S < row["t_ns"] <= NOW + n * S]
        found.add({"health": table("health", rows), "clocks": table("clocks", there)})
        said.append([one.on_rank for one in stuck.look(found)])
    return said


def test_a_host_that_died_is_silent_if_its_clock_was_compared() -> None:
    said = of_hosts(range(40), range(10), [0, 8])
    assert said == [[]] * 24 + [[1]] * 16, "15 s after its last heartbeat"
    assert not any(of_hosts(range(40), range(10)))


@pytest.mark.parametrize("compared_s", [[], [0, 4]], ids=["never", "not since"])
@pytest.mark.parametrize("by_s", [-20, 20])
def test_nobody_is_silent_where_a_clock_may_have_leapt_since_it_was_compared(
    by_s: int, compared_s: list[float]
) -> None:
    """The leap itself is forgotten after a minute."""
    leapt = [*range(5), *(n + by_s for n in range(5, 150))]
    assert not any(of_hosts(range(150), leapt, compared_s))
    assert not any(of_hosts(leapt, range(150), compared_s))


def test_nobody_is_silent_by_wall_clocks_that_differ() -> None:
    assert not any(of_hosts(range(40), range(30, 70)))


def test_who_dies_after_its_host_leapt_is_silent_once_the_others_have_gone_on_for_a_while() -> None:
    idle = {"open_cls": int(IDLE), "open_since_ns": NOW - 99 * S, "open_peer": -1}
    leapt = [*range(5), *range(25, 40)]
    (found,) = judged("bb", of_process(0, leapt, **idle), of_process(1, leapt[:8], **idle))
    assert (found.on_rank, found.phase) == (1, "silent")
    assert judged("bb", of_process(0, leapt[:7], **idle), of_process(1, leapt[:5], **idle)) == []
