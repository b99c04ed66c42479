"""Which small segments become one: neighbours in time, worth it, within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu.segments.layout import SegmentName
from insitu.segments.retention import Held
from insitu_collector.keeping.merge_plan import IN_BACKGROUND, ON_DEMAND, MergeRules, merges

MIB = 1 << 20
S = 10**9


def held(*sizes: int, every_s: float = 60, table: str = "events") -> list[Held]:
    return [Held(SegmentName(table, "a", n), size, round(n * every_s * S)) for n, size in enumerate(sizes)]


def numbers(groups: list[list[Held]]) -> list[list[int]]:
    return [[segment.name.number for segment in group] for group in groups]


def test_small_segments_are_merged_once_there_are_enough_of_them() -> None:
    assert merges(held(*[MIB] * 7), IN_BACKGROUND) == []
    assert numbers(merges(held(*[MIB] * 9), IN_BACKGROUND)) == [list(range(9))]
    assert numbers(merges(held(MIB, MIB), ON_DEMAND)) == [[0, 1]]


def test_what_is_large_or_spoken_for_is_left_alone_and_nothing_is_merged_across_it() -> None:
    sizes = [MIB] * 4 + [100 * MIB] + [MIB] * 4
    assert numbers(merges(held(*sizes), ON_DEMAND)) == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert numbers(merges(held(*[MIB] * 5), ON_DEMAND, {SegmentName("events", "a", 2)})) == [[0, 1], [3, 4]]


def test_hours_are_not_merged_with_each_other() -> None:
    groups = merges(held(*[MIB] * 20, every_s=600), ON_DEMAND)
    assert numbers(groups) == [list(range(7)), list(range(7, 14)), list(range(14, 20))]


def test_tables_are_not_merged_with_each_other() -> None:
    both = held(MIB, MIB) + [Held(SegmentName("steps", "a", n), MIB, n * S) for n in (2, 3)]
    assert {frozenset(s.name.table for s in group) for group in merges(both, ON_DEMAND)} == {
        frozenset({"events"}),
        frozenset({"steps"}),
    }


def test_one_large_segment_is_not_copied_for_a_few_small_ones() -> None:
    assert merges(held(60 * MIB, *[MIB] * 7), IN_BACKGROUND) == []
    assert numbers(merges(held(60 * MIB, *[MIB] * 9), IN_BACKGROUND)) == [list(range(1, 10))]


RULES = MergeRules(target_bytes=1000, min_inputs=3, max_span_s=100)
SEGMENTS = st.lists(st.tuples(st.integers(1, 1200), st.integers(0, 40)), max_size=40)


@given(SEGMENTS)
def test_each_merge_is_within_bounds_of_neighbours_and_doubles_what_it_copies(drawn: list[tuple[int, int]]) -> None:
    at, segments = 0, []
    for number, (size, pause_s) in enumerate(drawn):
        at += pause_s * S
        segments.append(Held(SegmentName("events", "a", number), size, at))
    groups = merges(segments, RULES)
    chosen = [segment for group in groups for segment in group]
    assert len({segment.name for segment in chosen}) == len(chosen), "none twice"
    for group in groups:
        first, last = group[0].name.number, group[-1].name.number
        assert [segment.name.number for segment in group] == list(range(first, last + 1)), "neighbours"
        size = sum(segment.num_bytes for segment in group)
        assert len(group) >= 3 and size <= 1000
        assert group[-1].unix_ns - group[0].unix_ns <= 100 * S
        assert all(2 * segment.num_bytes <= size for segment in group)


@given(SEGMENTS)
def test_merging_comes_to_an_end_and_copies_each_byte_a_few_times(drawn: list[tuple[int, int]]) -> None:
    segments = [Held(SegmentName("events", "a", n), size, n * S) for n, (size, _) in enumerate(drawn)]
    total, copied, number = sum(s.num_bytes for s in segments), 0, len(segments)
    while groups := merges(segments, RULES):
        for group in groups:
            size = sum(segment.num_bytes for segment in group)
            copied += size
            segments = [segment for segment in segments if segment not in group]
            segments.append(Held(SegmentName("events", "a", number), size, max(s.unix_ns for s in group)))
            number += 1
    assert sum(segment.num_bytes for segment in segments) == total
    assert copied <= 10 * total, "at least doubled each time, up to 1000 bytes"
