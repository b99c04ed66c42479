"""What a shard keeps: sizes and times in, what is to be unlinked out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.segments.layout import SegmentName
from insitu.segments.retention import (
    NAMES,
    NOTES,
    Busy,
    Epochs,
    Held,
    Keep,
    age_text,
    bytes_text,
    expired,
    parse_age,
    parse_bytes,
)

NOW_NS = 10**18
ROWS = ("intervals", "health", "events")


def held(table: str, number: int, age_s: float, num_bytes: int = 100) -> Held:
    return Held(SegmentName(table, "a", number), num_bytes, NOW_NS - round(age_s * 1e9))


def nobody(name: SegmentName) -> Epochs:
    raise AssertionError(f"nobody needs to know whose rows {name} holds")


def numbers(segments: Sequence[Held]) -> list[int]:
    return [segment.name.number for segment in segments]


def test_what_is_too_old_goes_oldest_first_and_the_last_number_stays() -> None:
    segments = [held("intervals", 0, 50), held("health", 1, 99), held("intervals", 2, 10), held("health", 3, 70)]
    assert numbers(expired(segments, Keep(None, 40), NOW_NS, Busy(), nobody)) == [1, 0]


def test_the_age_is_met_to_the_second() -> None:
    segments = [held("intervals", 0, 41), held("intervals", 1, 40), held("intervals", 2, 0)]
    assert numbers(expired(segments, Keep(None, 40), NOW_NS, Busy(), nobody)) == [0]


def test_what_is_too_much_goes_oldest_first_and_what_is_being_written_counts() -> None:
    segments = [held("intervals", n, 50 - n) for n in range(5)]
    assert numbers(expired(segments, Keep(300, None), NOW_NS, Busy(), nobody)) == [0, 1]
    assert numbers(expired(segments, Keep(300, None), NOW_NS, Busy(150), nobody)) == [0, 1, 2, 3]


def test_without_bounds_nothing_goes() -> None:
    segments = [held(table, n, 10**6, 10**12) for n, table in enumerate((*ROWS, *NOTES, *NAMES))]
    assert expired(segments, Keep(None, None), NOW_NS, Busy(), nobody) == []


def test_small_tables_stay_while_rows_of_their_epochs_do_and_go_by_age_after() -> None:
    segments = [
        held("sources", 0, 100),
        held("sources", 1, 100),
        held("verdicts", 2, 100),
        held("intervals", 3, 10),
        held("intervals", 4, 10),
    ]
    whose = {0: {7}, 1: {8}, 2: {8}, 3: {7}, 4: {7}}

    def epochs_of(name: SegmentName) -> Epochs:
        return Epochs(whose[name.number], whose[name.number])

    assert numbers(expired(segments, Keep(None, 40), NOW_NS, Busy(), epochs_of)) == [1, 2]
    assert numbers(expired(segments, Keep(None, 40), NOW_NS, Busy(epochs={8}), epochs_of)) == []
    assert numbers(expired(segments, Keep(1, None), NOW_NS, Busy(), epochs_of)) == [3], "small ones never by size"


def test_a_note_stays_for_those_it_speaks_of_and_names_stay_for_the_note() -> None:
    """A collector (epoch 1) wrote what is lost of epoch 7."""
    segments = [held("sources", 0, 100), held("gaps", 1, 100), held("intervals", 2, 10)]
    spoken = {0: Epochs({1}, {1}), 1: Epochs({1}, {7}), 2: Epochs({7}, {7})}
    assert expired(segments, Keep(None, 40), NOW_NS, Busy(), lambda name: spoken[name.number]) == []
    spoken[2] = Epochs({9}, {9})
    assert numbers(expired(segments, Keep(None, 40), NOW_NS, Busy(), lambda name: spoken[name.number])) == [0, 1]


shards = st.lists(
    st.tuples(
        st.sampled_from((*ROWS, *NOTES, *NAMES)),
        st.integers(0, 100),
        st.integers(0, 50),
        st.frozensets(st.integers(0, 3), min_size=1),
    ),
    max_size=14,
)
bounds = st.builds(Keep, st.none() | st.integers(1, 400), st.none() | st.integers(1, 100).map(float))
being_written = st.builds(Busy, st.integers(0, 100), st.frozensets(st.integers(0, 3)))


@given(shards, bounds, being_written)
def test_whatever_a_shard_holds(shard: list[tuple[str, int, int, frozenset[int]]], keep: Keep, busy: Busy) -> None:
    segments = [held(table, n, age_s, size) for n, (table, age_s, size, _) in enumerate(shard)]

    def epochs_of(name: SegmentName) -> Epochs:
        return Epochs(shard[name.number][3], shard[name.number][3])

    gone = expired(segments, keep, NOW_NS, busy, epochs_of)
    left = [segment for segment in segments if segment not in gone]
    assert len(set(gone)) == len(gone)
    assert [s.unix_ns for s in gone] == sorted(s.unix_ns for s in gone), "oldest first"
    assert len(shard) - 1 not in numbers(gone), "no number is used twice"
    may_go = [s for s in left if s.name.table in ROWS and s.name.number != len(shard) - 1]
    if keep.max_age_s is not None:
        assert all(NOW_NS - s.unix_ns <= keep.max_age_s * 1e9 for s in may_go)
    if keep.max_bytes is not None and may_go:
        assert busy.num_bytes + sum(s.num_bytes for s in left) <= keep.max_bytes
    rows_gone = [s for s in gone if s.name.table in ROWS]
    assert all(g.unix_ns <= s.unix_ns for g in rows_gone for s in may_go), "no younger row goes before an older one"
    is_over_age = [keep.max_age_s is not None and NOW_NS - s.unix_ns > keep.max_age_s * 1e9 for s in gone]
    if keep.max_bytes is not None and gone and not is_over_age[-1]:
        with_the_last = busy.num_bytes + sum(s.num_bytes for s in left) + gone[-1].num_bytes
        smalls = sum(s.num_bytes for s in gone if s.name.table not in ROWS)
        assert with_the_last + smalls > keep.max_bytes, "not one more than needed"
    alive = {epoch for s in left if s.name.table in ROWS for epoch in shard[s.name.number][3]} | set(busy.epochs)
    for segment, is_old in zip(gone, is_over_age, strict=True):
        if segment.name.table not in ROWS:
            assert is_old
            assert not shard[segment.name.number][3] & alive


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("4096", 4096), ("none", None), ("NONE", None)],
)
def test_sizes(text: str, num_bytes: int | None) -> None:
    assert parse_bytes(text) == num_bytes
    assert parse_bytes(bytes_text(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("text", "age_s"), [("24h", 86400), ("90m", 5400), ("7d", 604800), ("30s", 30), ("none", None)]
)
def test_lengths_of_time(text: str, age_s: float | None) -> None:
    assert parse_age(text) == age_s
    assert parse_age(age_text(age_s)) == age_s


@pytest.mark.parametrize("text", ["", "lots", "-1", "2 GiX", "0", "GiB", "9" * 400])
def test_nonsense_is_one_line_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 2GiB"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="write it like 24h"):
        parse_age(text)


def test_it_says_itself_for_people() -> None:
    assert str(Keep()) == "2 GiB or 24 h, oldest first"
    assert str(Keep(None, 90.0)) == "90 s, oldest first"
    assert str(Keep(None, None)) == "everything"
