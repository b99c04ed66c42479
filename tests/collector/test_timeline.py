"""One line for the clocks of several hosts: measured ones come together, one host is never moved against itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_kit import table

from insitu.records import schema_of
from insitu_collector.clocks.timeline import timeline_of

SECOND = 1_000_000_000
DAY = 86_400 * SECOND


def source(epoch: int, boot: str, unix_off_ns: int = 0, mono_ns: int = 0) -> dict[str, Any]:
    """A process of a host whose clock is ahead by `mono_ns`, and which believes its Unix clock."""
    return {"epoch": epoch, "boot_id": boot, "unix_anchor_ns": DAY + unix_off_ns, "mono_anchor_ns": mono_ns}


def compared(host: str, t_ns: int, ahead_ns: int, *, with_host: str = "c", error_ns: int = 1_000) -> dict[str, Any]:
    return {"host_a": with_host, "host_b": host, "t_ns": t_ns, "offset_ns": ahead_ns, "error_ns": error_ns}


def times(epoch: int, t_ns: list[int]) -> pa.Table:
    return table("health", [{"epoch": epoch, "t_ns": t} for t in t_ns])


def test_one_host_is_never_moved_whatever_its_anchors_say() -> None:
    line = timeline_of(table("sources", [source(1, "a"), source(2, "a", unix_off_ns=SECOND)]))
    assert line.moved(times(2, [5, 7]), "t_ns").tolist() == [5, 7]
    assert line.error_ns(1, 2) == 0


def test_without_measurements_the_anchors_count_and_nobody_knows_how_much() -> None:
    line = timeline_of(table("sources", [source(1, "a"), source(2, "b", mono_ns=300)]))
    assert line.moved(times(2, [305]), "t_ns").tolist() == [5]
    assert line.error_ns(1, 2) is None


@given(
    ahead=st.integers(-(10**14), 10**14),
    wrong=st.integers(-(10**10), 10**10),
    error=st.integers(0, 10**6),
    reference_is_collector=st.booleans(),
    base=st.integers(-(10**13), 10**13),
)
def test_a_measured_host_comes_out_within_the_error_stated(
    ahead: int, wrong: int, error: int, reference_is_collector: bool, base: int
) -> None:
    """The true time is that of host `a`; the collector is `a`, or a third host that is `base` behind it."""
    sources = table("sources", [source(1, "a"), source(2, "b", unix_off_ns=wrong, mono_ns=ahead)])
    collector, ahead_of_a = ("a", 0) if reference_is_collector else ("c", base)
    rows = []
    for n, true_ns in enumerate(range(0, 40 * SECOND, 10 * SECOND)):
        off = error if n % 2 else -error
        told = ahead + ahead_of_a + off
        rows.append(compared("b", true_ns + ahead, told, with_host=collector, error_ns=error))
        if not reference_is_collector:
            rows.append(compared("a", true_ns, ahead_of_a, with_host=collector, error_ns=0))
    line = timeline_of(sources, table("clocks", rows))
    true = np.arange(0, 45 * SECOND, 3 * SECOND)
    moved = line.moved(times(2, (true + ahead).tolist()), "t_ns")
    allowed = line.error_ns(1, 2)
    assert allowed == error
    assert np.abs(moved - true).max() <= allowed + 2  # two roundings


def test_a_constant_added_to_one_clock_changes_nothing_once_it_is_measured() -> None:
    moved = []
    for ahead in (0, 12_345_678_901):
        sources = table("sources", [source(1, "c"), source(2, "b", mono_ns=ahead)])
        clocks = table("clocks", [compared("b", t + ahead, ahead) for t in (0, 10 * SECOND)])
        line = timeline_of(sources, clocks)
        moved.append(line.moved(times(2, [ahead, ahead + 5, ahead + 99 * SECOND]), "t_ns").tolist())
    assert moved[0] == moved[1]


def test_drift_between_measurements_is_taken_out_evenly() -> None:
    sources = table("sources", [source(1, "c"), source(2, "b")])
    line = timeline_of(sources, table("clocks", [compared("b", 0, 0), compared("b", 10 * SECOND, 1_000_000)]))
    assert line.moved(times(2, [5 * SECOND, 20 * SECOND]), "t_ns").tolist() == [
        5 * SECOND - 500_000,
        20 * SECOND - 1_000_000,
    ]


def test_drift_since_the_last_measurement_adds_to_the_error() -> None:
    ahead = 7 * SECOND
    sources = table("sources", [source(1, "c"), source(2, "b"), source(3, "d")])
    rows = [compared(host, t + ahead, ahead, error_ns=9) for host in "bd" for t in (0, 10 * SECOND)]
    line = timeline_of(sources, table("clocks", rows))
    assert line.error_ns(1, 2) == line.error_ns(1, 2, 3 * SECOND) == line.error_ns(1, 2, 10 * SECOND) == 9
    assert line.error_ns(1, 2, 110 * SECOND) == 9 + 10_000_000, "100 parts in a million of 100 s"
    assert line.error_ns(2, 3, 110 * SECOND) == 2 * (9 + 10_000_000)
    assert line.error_ns(2, 2, 110 * SECOND) == line.error_ns(1, 1, 110 * SECOND) == 0


def test_the_error_is_that_of_the_measurements_around_a_time() -> None:
    sources = table("sources", [source(1, "c"), source(2, "b")])
    rows = [compared("b", n * 10 * SECOND, 0, error_ns=error) for n, error in enumerate((5, 7, 90, 3))]
    line = timeline_of(sources, table("clocks", rows))
    at = np.array([5, 10, 15, 20, 25, 30], np.int64) * SECOND
    found = line.errors_ns(1, 2, at)
    assert found is not None and found.tolist() == [7, 7, 90, 90, 90, 3]
    assert line.error_ns(1, 2) == 90
    assert line.error_ns(1, 2, -100 * SECOND) == 5 + 10_000_000, "before the first nobody knows what drifted"
    assert line.errors_ns(1, 77, at) is None


@given(
    jump=st.integers(-8 * SECOND, 10**12).filter(lambda ns: abs(ns) > 5_000_000),
    at=st.integers(1, 3),
    t_ns=st.lists(st.integers(0, 40 * SECOND), min_size=1, max_size=20),
)
def test_a_jump_changes_no_duration_and_is_the_error_of_what_lies_around_it(
    jump: int, at: int, t_ns: list[int]
) -> None:
    """True times are those of host c; the clock of b jumps between two measurements, halfway."""
    when = (at * 10 - 5) * SECOND
    own = [t + (jump if t >= when else 0) for t in sorted(t_ns)]
    rows = [
        compared("b", t + ahead, ahead) for t in range(0, 50 * SECOND, 10 * SECOND) for ahead in [jump * (t > when)]
    ]
    line = timeline_of(table("sources", [source(1, "c"), source(2, "b")]), table("clocks", rows))
    moved = line.moved(times(2, own), "t_ns")
    errors = line.errors_ns(1, 2, moved)
    assert errors is not None
    assert (np.abs(moved - np.array(sorted(t_ns))) <= errors).all()
    between = (2 * when + jump) // 2  # of the clock of b, halfway between the two measurements
    apart = line.moved(times(2, [between - SECOND // 2, between + SECOND // 2]), "t_ns")
    assert apart[1] - apart[0] == SECOND


aheads = st.one_of(st.integers(-3, 3), st.sampled_from([-7 * SECOND, 9 * SECOND]))


@given(st.lists(st.tuples(st.integers(0, 60), aheads, st.integers(0, 3)), min_size=2, max_size=12))
def test_errors_differ_from_another_lines_only_where_it_says_so(measured: list[tuple[int, int, int]]) -> None:
    sources = table("sources", [source(1, "c"), source(2, "b")])
    rows = [compared("b", t * SECOND, ahead, error_ns=error) for t, ahead, error in measured]
    before, after = (timeline_of(sources, table("clocks", part)) for part in (rows[:-1], rows[1:]))
    at = np.arange(-20 * SECOND, 90 * SECOND, SECOND // 4)
    errors = [line.errors_ns(1, 2, at) for line in (before, after)]
    assert errors[0] is not None and errors[1] is not None
    said = np.zeros(len(at), bool)
    for begin, end in after.differing(before):
        said |= (at >= begin) & (at <= end)
    assert not (said[errors[0] != errors[1]] == 0).any()
    assert before.differing(before) == []


@pytest.mark.parametrize("by_s", [-3600, 2, 3600])
def test_a_jump_that_is_long_past_makes_no_later_comparison_change_more_than_the_end(by_s: int) -> None:
    sources = table("sources", [source(1, "c"), source(2, "b")])
    true = [0, 10, 20, 30, 40, 50]
    rows = [compared("b", (t + ahead) * SECOND, ahead * SECOND) for t in true for ahead in [by_s * (t > 15)]]
    before, after = (timeline_of(sources, table("clocks", part)) for part in (rows[:-1], rows))
    stretches = after.differing(before)
    assert stretches and min(begin for begin, _ in stretches) == 40 * SECOND


def test_a_reference_whose_clock_went_back_is_related_through_a_third_all_the_same() -> None:
    """True times are those of the third, c; b is 3 s ahead of it, and the reference 100 s, from 15 s on 75 s."""
    sources = table("sources", [source(1, "a"), source(2, "b"), source(3, "c")])
    rows = []
    for t in range(0, 50, 10):
        of_a = 100 if t < 15 else 75
        rows += [compared("a", (t + of_a) * SECOND, of_a * SECOND), compared("b", (t + 3) * SECOND, 3 * SECOND)]
    line = timeline_of(sources, table("clocks", rows))
    at = [2, 8, 22, 28, 38]
    expected = [(t + (100 if t < 15 else 75)) * SECOND for t in at]
    assert line.moved(times(2, [(t + 3) * SECOND for t in at]), "t_ns").tolist() == expected
    assert line.moved(times(3, [t * SECOND for t in at]), "t_ns").tolist() == expected


def test_what_messages_show_widens_the_error_of_two_hosts_and_of_no_others() -> None:
    sources = table("sources", [source(1, "c"), source(2, "b"), source(3, "d")])
    clocks = table("clocks", [compared(host, t * SECOND, 0, error_ns=9) for host in "bd" for t in (0, 50)])
    line = timeline_of(sources, clocks).widened({frozenset("cb"): 700})
    assert line.error_ns(1, 2) == line.error_ns(2, 1, 5 * SECOND) == 700
    assert line.error_ns(1, 3) == 9 and line.error_ns(2, 3) == 18 and line.error_ns(2, 2) == 0
    alone = timeline_of(sources).widened({frozenset("cb"): 700})
    assert alone.error_ns(1, 2) is None


def test_hosts_measured_against_different_collectors_are_not_put_together() -> None:
    sources = table("sources", [source(1, "a"), source(2, "b"), source(3, "d")])
    clocks = table("clocks", [compared("a", 0, 5, with_host="c"), compared("b", 0, 7, with_host="other")])
    line = timeline_of(sources, clocks)
    assert line.error_ns(1, 2) is None
    assert line.error_ns(1, 1) == 0
    assert line.error_ns(2, 77) is None


@pytest.mark.parametrize("row", [{"offset_ns": None}, {"error_ns": -1}, {"host_b": "c"}, {"host_a": None}])
def test_a_measurement_that_makes_no_sense_is_left_out(row: dict[str, Any]) -> None:
    sources = table("sources", [source(1, "c"), source(2, "b")])
    assert timeline_of(sources, table("clocks", [compared("b", 0, 5) | row])).error_ns(1, 2) is None


def test_nobody_has_written_yet() -> None:
    line = timeline_of(schema_of("sources").empty_table(), table("clocks", [compared("b", 0, 5)]))
    assert line.unix_ns(5) == 5 and line.error_ns(1, 2) is None
