"""Tiles of the ledger as it grows: the same in any order, exact sums, what comes late is taken in or counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_kit import beat, interval, table

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.ledger.tiles import FINE_NS, LEVELS_NS, Late, TileLedger
from insitu_collector.ledger.window import Ledger, rank_ledger

MS = 1_000_000
SECOND = 1000 * MS
MOVABLE = {LedgerClass.COMPUTE, LedgerClass.HOST, LedgerClass.CONTENDED}
Row = dict[str, Any]
Places = dict[tuple[int, LedgerClass, int | None], int]


def sources(boots: Sequence[str] = ("a", "a"), mono: Sequence[int] = (0, 0)) -> pa.Table:
    common = {"role": "rank", "unix_anchor_ns": 10**18}
    rows = [
        {**common, "rank": r, "stage": r, "boot_id": boot, "mono_anchor_ns": at}
        for r, (boot, at) in enumerate(zip(boots, mono, strict=True))
    ]
    return table("sources", rows)


def numbered(rows: Iterable[Row]) -> list[Row]:
    return [row | {"row_seq": n} for n, row in enumerate(rows)]


def fed(intervals: Iterable[Row], health: Iterable[Row] = (), of: pa.Table | None = None) -> TileLedger:
    """A ledger that got everything at once."""
    found = TileLedger()
    found.add({"sources": sources() if of is None else of})
    found.add({"intervals": table("intervals", intervals), "health": table("health", health)})
    found.settle()
    return found


def places(ledger: Ledger) -> Places:
    return {(row.rank, row.cls, row.on_rank): row.ns for row in ledger.rows}


def seen(ledger: TileLedger) -> dict[tuple[int, int], tuple[Places, dict[int, int], dict[int, int]]]:
    """What every tile says that all ranks have reported past."""
    until = ledger.settled_ns or 0
    tiles = [tile for width_ns in LEVELS_NS for tile in ledger.tiles(width_ns) if tile.t1_ns <= until]
    as_ledgers = {(tile.width_ns, tile.t0_ns): tile.ledger() for tile in tiles}
    return {key: (places(each), each.overlap_ns, each.unattributed_ns) for key, each in as_ledgers.items()}


def total(ledgers: Iterable[Ledger]) -> Places:
    sums: Places = {}
    for ledger in ledgers:
        for key, ns in places(ledger).items():
            sums[key] = sums.get(key, 0) + ns
    return sums


times = st.integers(0, 60).map(lambda n: n * 37_000_001)  # few, so that some begin at once
stretches = st.lists(
    st.builds(
        interval,
        st.integers(0, 14),
        times,
        times,
        rank=st.sampled_from([0, 1]),
        peer=st.integers(-1, 3),
        cpu=st.integers(0, SECOND // 4),
    ),
    min_size=1,
    max_size=25,
).map(numbered)
open_states = st.fixed_dictionaries({}, optional={"open_cls": st.integers(0, 13), "open_since_ns": times})
beats = st.lists(
    st.builds(
        lambda t, delay, rank, opened: beat(t, t // 3 + delay, rank=rank, **opened),
        times,
        st.integers(0, SECOND // 4),
        st.sampled_from([0, 1]),
        open_states,
    ),
    max_size=8,
).map(numbered)


@given(stretches, beats, st.randoms(use_true_random=False))
@settings(max_examples=120, deadline=None)
def test_any_order_and_any_partition_give_the_same_tiles(rows: list[Row], health: list[Row], random: Random) -> None:
    whole = fed(rows, health)
    parts = TileLedger()
    parts.add({"sources": sources()})
    mixed = [("intervals", row) for row in rows] + [("health", row) for row in health]
    random.shuffle(mixed)
    while mixed:
        few = [mixed.pop() for _ in range(min(len(mixed), random.randint(1, 6)))]
        parts.add({name: table(name, [row for of, row in few if of == name]) for name in ("health", "intervals")})
        if random.random() < 0.6:
            parts.settle()
    parts.settle()
    assert seen(parts) == seen(whole)
    assert parts.late == whole.late == Late()


@given(stretches, beats)
@settings(max_examples=80, deadline=None)
def test_tiles_add_up_to_the_ledger_of_the_window(rows: list[Row], health: list[Row]) -> None:
    end = 3 * SECOND
    edges = [beat(t, n * 3 * SECOND, rank=rank) for rank in (0, 1) for n, t in enumerate((0, end))]
    full = numbered([interval(IntervalClass.HOST, 0, 1), *rows])
    found = fed(full, [*health, *edges])
    fine, whole = found.tiles(FINE_NS), [tile.ledger() for tile in found.tiles(SECOND)]
    assert (len(fine), len(whole)) == (30, 3)
    assert total(whole) == total(tile.ledger() for tile in fine), "1 s is the exact sum of ten of 100 ms"
    expected = rank_ledger(table("intervals", full), table("health", [*health, *edges]), sources(), 0, end)
    sums, exact = total(whole), places(expected)
    for rank in (0, 1):
        assert sum(ns for (of, *_), ns in sums.items() if of == rank) == end
        moved, there = ({k: v for k, v in each.items() if k[0] == rank and k[1] in MOVABLE} for each in (sums, exact))
        assert sum(moved.values()) == sum(there.values())
        for cls in MOVABLE:
            differ = moved.get((rank, cls, None), 0) - there.get((rank, cls, None), 0)
            assert abs(differ) <= 2 * (len(fine) + 1), "one ns a tile, of compute and of host"
        others = [{k: v for k, v in each.items() if k[0] == rank and k[1] not in MOVABLE} for each in (sums, exact)]
        assert others[0] == others[1]
    assert {r: sum(t.ledger().overlap_ns[r] for t in fine) for r in (0, 1)} == expected.overlap_ns


def test_ten_seconds_are_the_exact_sum_of_ten() -> None:
    rows = [interval(n % 12, n * 37 * MS, (n + 1) * 37 * MS, rank=r, peer=1 - r) for r in (0, 1) for n in range(600)]
    found = fed(rows, [beat(n * SECOND, n * 90 * MS, rank=rank) for rank in (0, 1) for n in range(23)])
    tens = found.tiles(10 * SECOND)
    assert [tile.t0_ns for tile in tens] == [0, 10 * SECOND]
    for ten in tens:
        parts = [t for t in found.tiles(SECOND) if ten.t0_ns <= t.t0_ns < ten.t1_ns]
        assert total([ten.ledger()]) == total(part.ledger() for part in parts)
        assert {rank: ten.ledger().ns(rank) for rank in (0, 1)} == {0: 10 * SECOND, 1: 10 * SECOND}


no_idle = st.sampled_from(list(range(1, 14)))


@given(st.lists(st.tuples(no_idle, st.integers(1, 90), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_dropped_intervals_show_up_as_unrecorded_and_nothing_else(parts: list[tuple[int, int, bool]]) -> None:
    rows, t = [], 0
    for cls, length, kept in parts:
        rows.append((interval(cls, t * MS, (t + length) * MS, rank=1, peer=0), kept))
        t += length
    stamps = [beat(t * MS, rank=rank) for rank in (0, 1)] + [beat(0, rank=rank) for rank in (0, 1)]
    first = interval(IntervalClass.HOST, 0, 1)
    whole = seen(fed([first, *(row for row, _ in rows)], stamps))
    partial = seen(fed([first, *(row for row, kept in rows if kept)], stamps))
    assert whole.keys() == partial.keys()
    for key, (before, *_) in whole.items():
        after = partial[key][0]
        grown = {at for at, ns in after.items() if ns > before.get(at, 0)}
        assert grown <= {(1, LedgerClass.UNRECORDED, None)}
        assert sum(before.values()) == sum(after.values())


def receives(split: int = 0, shift: int = 0) -> tuple[list[Row], list[Row]]:
    """Two ranks, 60 steps; rank 1 on another host: its clock `shift` ahead, its receives split `split` later."""
    rows: list[Row] = []
    for t in range(0, 3000, 50):
        rows.append(interval(IntervalClass.COMPUTE, t * MS, (t + 45) * MS))
        rows.append(interval(IntervalClass.SEND_WAIT, (t + 45) * MS, (t + 50) * MS, peer=1))
        at, cut, end = t * MS + shift, (t + 20) * MS + split + shift, (t + 30) * MS + shift
        rows.append(interval(IntervalClass.RECV_WAIT, at, cut, rank=1, peer=0))
        rows.append(interval(IntervalClass.RECV_XFER, cut, end, rank=1, peer=0))
        rows.append(interval(IntervalClass.COMPUTE, end, (t + 50) * MS + shift, rank=1))
    health = [beat(n * SECOND + rank * shift, n * 5 * MS, rank=rank) for rank in (0, 1) for n in range(4)]
    return rows, health


@given(st.integers(-(10**15), 10**15), st.integers(-9 * MS, 9 * MS))
@settings(max_examples=25, deadline=None)
def test_a_constant_on_one_hosts_clock_changes_nothing_but_the_split(shift: int, split: int) -> None:
    plain = seen(fed(*receives(), sources("ab")))
    assert seen(fed(*receives(shift=shift), sources("ab", (0, shift)))) == plain
    moved = seen(fed(*receives(split=split), sources("ab")))
    between = {(1, LedgerClass.WAIT_UPSTREAM, 0), (1, LedgerClass.TRANSFER, None)}
    for key, (here, *_) in plain.items():
        there = moved[key][0]
        assert {at for at in here.keys() | there.keys() if here.get(at) != there.get(at)} <= between


def test_a_split_without_a_usable_clock_is_unattributed() -> None:
    (one,) = [tile.ledger() for tile in fed(*receives(), sources("aa")).tiles(SECOND)][:1]
    (two,) = [tile.ledger() for tile in fed(*receives(), sources("ab")).tiles(SECOND)][:1]
    assert one.unattributed_ns == {0: 0, 1: 0}
    received = two.ns(1, LedgerClass.WAIT_UPSTREAM, LedgerClass.TRANSFER)
    assert two.unattributed_ns == {0: 0, 1: received}
    assert received > 0


def test_a_late_row_changes_its_tile_until_it_is_final_and_is_counted_after() -> None:
    ledger = TileLedger(late_ns=2 * SECOND)
    ledger.add({"sources": sources()})
    ledger.add({"intervals": table("intervals", [interval(IntervalClass.HOST, 0, MS)])})
    ledger.add({"health": table("health", [beat(5 * SECOND, rank=rank) for rank in (0, 1)])})
    ledger.settle()
    assert ledger.final_ns == 3 * SECOND

    def computed(second: int) -> int:
        return ledger.tiles(SECOND)[second].ledger().ns(0, LedgerClass.COMPUTE)

    ledger.add({"intervals": table("intervals", [interval(IntervalClass.COMPUTE, 4100 * MS, 4200 * MS)])})
    changed = ledger.settle()
    assert [tile.t0_ns for tile in changed[SECOND]] == [4 * SECOND]
    assert (computed(4), ledger.late) == (100 * MS, Late())
    ledger.add({"intervals": table("intervals", [interval(IntervalClass.COMPUTE, 1100 * MS, 1200 * MS)])})
    ledger.settle()
    assert (computed(1), ledger.late) == (0, Late(1, 100 * MS))


def test_the_row_of_an_interval_that_was_open_for_long_is_not_late() -> None:
    ledger = TileLedger(late_ns=2 * SECOND)
    ledger.add({"sources": sources()})
    ledger.add({"intervals": table("intervals", [interval(IntervalClass.HOST, 0, MS)])})
    for n in range(1, 40):
        opened = {"open_cls": int(IntervalClass.IDLE), "open_since_ns": MS}
        ledger.add({"health": table("health", [beat(n * SECOND, **opened), beat(n * SECOND, rank=1)])})
        ledger.settle()
    ledger.add({"intervals": table("intervals", [interval(IntervalClass.IDLE, MS, 40 * SECOND)])})
    ledger.add({"health": table("health", [beat(40 * SECOND), beat(40 * SECOND, rank=1)])})
    ledger.settle()
    assert ledger.late == Late()
    idle = [tile.ledger().ns(0, LedgerClass.NO_DEMAND) for tile in ledger.tiles(SECOND)]
    assert idle == [SECOND - MS] + [SECOND] * 39


def test_what_was_open_and_never_came_is_unrecorded_again() -> None:
    ledger = fed(
        [interval(IntervalClass.HOST, 0, MS)],
        [beat(2 * SECOND, open_cls=int(IntervalClass.COMPUTE), open_since_ns=MS), beat(2 * SECOND, rank=1)],
    )
    assert ledger.tiles(SECOND)[1].ledger().ns(0, LedgerClass.COMPUTE) == SECOND
    ledger.add({"health": table("health", [beat(3 * SECOND), beat(3 * SECOND, rank=1)])})
    ledger.settle()
    assert [tile.ledger().ns(0, LedgerClass.UNRECORDED) for tile in ledger.tiles(SECOND)][1:] == [SECOND, SECOND]


def test_no_tile_is_made_before_every_rank_has_reported_past_it() -> None:
    rows = [interval(IntervalClass.COMPUTE, 0, 2 * SECOND), interval(IntervalClass.COMPUTE, 0, SECOND, rank=1)]
    ledger = fed(rows)
    assert ledger.settled_ns == SECOND
    assert [tile.t0_ns for tile in ledger.tiles(SECOND)] == [0]
    ledger.add({"intervals": table("intervals", [interval(IntervalClass.COMPUTE, 2 * SECOND, 5 * SECOND)])})
    ledger.settle()
    assert ledger.settled_ns == 5 * SECOND, "rank 1 has been silent for over 3 s"
    assert ledger.tiles(SECOND)[3].ledger().ns(1, LedgerClass.UNRECORDED) == SECOND


def test_rows_and_tiles_that_are_kept_are_bounded() -> None:
    keep = dict.fromkeys(LEVELS_NS, 20)
    ledger = TileLedger(late_ns=2 * SECOND, keep=keep)
    ledger.add({"sources": sources()})
    most = 0
    for n in range(400):
        rows = [interval(IntervalClass.COMPUTE, n * SECOND, (n + 1) * SECOND, rank=rank) for rank in (0, 1)]
        ledger.add({"intervals": table("intervals", rows)})
        ledger.add({"health": table("health", [beat((n + 1) * SECOND, rank=rank) for rank in (0, 1)])})
        ledger.settle()
        most = max(most, ledger.num_held_rows)
    assert most <= 2 * 9
    assert {width: len(ledger.tiles(width)) for width in LEVELS_NS} == {FINE_NS: 120, SECOND: 20, 10 * SECOND: 20}
    assert ledger.late == Late()


def test_empty_tables_give_no_tiles() -> None:
    ledger = TileLedger()
    ledger.add({})
    ledger.add({name: schema_of(name).empty_table() for name in ("sources", "intervals", "health")})
    assert not any(ledger.settle().values())
    assert (ledger.settled_ns, ledger.final_ns, ledger.tiles(FINE_NS)) == (None, None, [])
    ledger.add({"sources": sources()})
    assert not any(ledger.settle().values())


def test_one_rank_alone_and_unknown_classes() -> None:
    ledger = TileLedger()
    rows = [interval(200, 0, SECOND, rank=7), interval(IntervalClass.RECV_WAIT, SECOND, 2 * SECOND, rank=7, peer=3)]
    ledger.add({"intervals": table("intervals", rows)})
    ledger.settle()
    found = [places(tile.ledger()) for tile in ledger.tiles(SECOND)]
    assert found == [{(7, LedgerClass.OTHER, None): SECOND}, {(7, LedgerClass.WAIT_UPSTREAM, 3): SECOND}]


@pytest.mark.parametrize("jump", [-(10**18), -7 * SECOND, -SECOND, SECOND, 10**15, 4 * 10**18])
def test_a_clock_that_jumps_gives_tiles_that_still_sum_and_loses_nothing_silently(jump: int) -> None:
    ledger = TileLedger()
    ledger.add({"sources": sources()})
    for n in range(12):
        by = jump if n >= 6 else 0
        rows = [interval(IntervalClass.COMPUTE, n * SECOND + by * r, (n + 1) * SECOND + by * r, rank=r) for r in (0, 1)]
        ledger.add({"intervals": table("intervals", rows)})
        ledger.add({"health": table("health", [beat((n + 1) * SECOND + by * r, rank=r) for r in (0, 1)])})
        ledger.settle()
    for tile in ledger.tiles(SECOND):
        assert {rank: tile.ledger().ns(rank) for rank in (0, 1)} == {0: SECOND, 1: SECOND}
    if jump == -(10**18):
        assert ledger.late.num_rows == 6


def compared(offset_ns: int, error_ns: int) -> pa.Table:
    row = {"rank": 1, "stage": 1, "host_a": "a", "host_b": "b", "t_ns": 0, "offset_ns": offset_ns, "error_ns": error_ns}
    return table("clocks", [row])


def test_a_comparison_of_clocks_moves_rows_that_are_held_and_bounds_the_split() -> None:
    rows, health = receives(shift=30 * MS)
    late = fed(rows, health, sources("ab"))
    late.add({"clocks": compared(30 * MS, 0)})
    late.settle()
    early = TileLedger()
    early.add({"sources": sources("ab"), "clocks": compared(30 * MS, 0)})
    early.add({"intervals": table("intervals", rows), "health": table("health", health)})
    early.settle()
    assert seen(late) == seen(early) != {}
    second = early.tiles(SECOND)[0].ledger()
    assert second.unattributed_ns[1] < second.ns(1, LedgerClass.WAIT_UPSTREAM, LedgerClass.TRANSFER)


def test_a_heartbeat_between_two_others_spreads_delay_anew() -> None:
    rows = [interval(IntervalClass.COMPUTE, 0, 3 * SECOND, rank=rank, cpu=0) for rank in (0, 1)]
    ends = [beat(t, t // 3, rank=rank) for rank in (0, 1) for t in (0, 3 * SECOND)]
    between = beat(SECOND, SECOND * 9 // 10)
    late = fed(rows, ends)
    assert late.tiles(SECOND)[0].ledger().ns(0, LedgerClass.CONTENDED) == pytest.approx(SECOND / 3, abs=20)
    late.add({"health": table("health", [between])})
    late.settle()
    assert late.tiles(SECOND)[0].ledger().ns(0, LedgerClass.CONTENDED) == pytest.approx(SECOND * 0.9, abs=20)
    assert seen(late) == seen(fed(rows, [*ends, between]))


def compare_at(*measured: tuple[int, int]) -> pa.Table:
    """(time of the host's clock, error) of each."""
    rows = [
        {"rank": 1, "stage": 1, "host_a": "a", "host_b": "b", "t_ns": t_ns, "offset_ns": 0, "error_ns": error_ns}
        for t_ns, error_ns in measured
    ]
    return table("clocks", rows)


def test_a_split_is_judged_by_the_error_of_its_time() -> None:
    rows, health = receives()
    measured = [(0, 0), (SECOND, 0), (2 * SECOND, 2 * MS), (3 * SECOND, 0), (4 * SECOND, 0)]
    ledger = TileLedger()
    ledger.add({"sources": sources("ab"), "clocks": compare_at(*measured)})
    ledger.add({"intervals": table("intervals", rows), "health": table("health", health)})
    ledger.settle()
    found = [tile.ledger().unattributed_ns[1] for tile in ledger.tiles(SECOND)]
    steps = SECOND // (50 * MS)
    assert found[0] == 0
    assert found[1:3] == [2 * steps * 2 * MS, 2 * steps * 2 * MS], "2 ms before and after each split"


@given(st.integers(0, 4), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_when_comparisons_of_clocks_come_changes_no_tile(first: int, then: int) -> None:
    rows, health = receives()
    measured = [(n * SECOND, (0, 3 * MS, MS, 0, 2 * MS)[n]) for n in range(5)]
    late = TileLedger()
    late.add({"sources": sources("ab"), "clocks": compare_at(*measured[:first])})
    late.add({"intervals": table("intervals", rows), "health": table("health", health)})
    late.settle()
    for part in (measured[first:then], measured[max(first, then) :]):
        late.add({"clocks": compare_at(*part)})
        late.settle()
    early = TileLedger()
    early.add({"sources": sources("ab"), "clocks": compare_at(*measured)})
    early.add({"intervals": table("intervals", rows), "health": table("health", health)})
    early.settle()
    assert seen(late) == seen(early)


def test_a_comparison_after_a_jump_makes_only_the_end_again() -> None:
    """The clock of rank 1 leaps by 2 s at 7 s."""
    begins = [(rank, n + 2 * (rank == 1 and n >= 7)) for rank in (0, 1) for n in range(25)]
    rows = [interval(IntervalClass.COMPUTE, n * SECOND, (n + 1) * SECOND, rank=rank) for rank, n in begins]
    common = {"rank": 1, "stage": 1, "host_a": "a", "host_b": "b", "error_ns": 0}
    clocks = [
        {**common, "t_ns": (t + by) * SECOND, "offset_ns": by * SECOND}
        for t in range(0, 25, 5)
        for by in [2 * (t >= 7)]
    ]
    found = TileLedger()
    found.add({"sources": sources("ab"), "clocks": table("clocks", clocks[:-1])})
    found.add({"intervals": table("intervals", rows)})
    assert found.settle()[FINE_NS][0].t0_ns == 0
    found.add({"clocks": table("clocks", clocks[-1:])})
    assert [tile.t0_ns for tile in found.settle()[FINE_NS]] == list(range(15 * SECOND, 25 * SECOND, FINE_NS))


def test_heartbeats_that_come_with_too_many_intervals_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is opened on a store that holds more intervals than are held."""
    monkeypatch.setattr("insitu_collector.ledger.tiles.MOST_ROWS", 50)
    rows = numbered(
        interval(IntervalClass.COMPUTE, n * FINE_NS, (n + 1) * FINE_NS, rank=rank, cpu=0)
        for rank in (0, 1)
        for n in range(40)
    )
    health = [beat(n * SECOND, n * SECOND // 2, rank=rank) for rank in (0, 1) for n in range(5)]
    found = fed(rows, health)
    assert found.num_held_rows == 0, "they were too many"
    assert [tile.ledger().ns(0, LedgerClass.CONTENDED) for tile in found.tiles(SECOND)] == [SECOND // 2] * 4


@pytest.mark.parametrize("early", [0, MS])
def test_messages_that_contradict_the_clocks_leave_splits_below_what_they_show_unattributed(early: int) -> None:
    """Rank 0 sends 10 ms before rank 1 has it, by clocks said to be exact; with `early`, so much after."""
    rows: list[Row] = []
    for step in range(60):
        t, seen_ns = step * 50 * MS, (10 * MS if not early else -early)
        sent, got = t + 20 * MS, t + 20 * MS + seen_ns
        numbers_ = {"step_id": step, "mb": 0}
        rows.append(interval(IntervalClass.SEND_XFER, sent, sent + MS, peer=1) | numbers_)
        rows.append(interval(IntervalClass.RECV_WAIT, t, got - 5 * MS, rank=1, peer=0) | numbers_)
        rows.append(interval(IntervalClass.RECV_XFER, got - 5 * MS, got, rank=1, peer=0) | numbers_)
    clocks = compare_at((0, 0), (4 * SECOND, 0))
    found = rank_ledger(table("intervals", rows), table("health", []), sources("ab"), 0, 3 * SECOND, clocks)
    assert found.unattributed_ns == {0: 0, 1: 60 * 2 * early}
