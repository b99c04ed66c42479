"""Slices in lanes, and clipped to a window."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.export.trace import Slice, clipped, in_lanes


def one(t0: int, t1: int) -> Slice:
    return Slice(t0, t1, f"{t0}-{t1}", "x", {})


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)), max_size=40))
def test_lanes_hold_every_slice_once_without_overlap_and_are_as_few_as_can_be(drawn: list[tuple[int, int]]) -> None:
    slices = [one(t0, t0 + length) for t0, length in drawn]
    tracks = in_lanes("n", [[each] for each in slices])
    assert sorted(each for track in tracks for each in track.slices()) == sorted(slices)
    for track in tracks:
        rows = list(track.slices())
        assert all(a.t1_ns <= b.t0_ns for a, b in pairwise(rows))
    deepest = max((sum(a.t0_ns <= t < a.t1_ns for a in slices) for t in range(131)), default=0)
    assert len(tracks) <= max(deepest, 1) + sum(a.t0_ns == a.t1_ns for a in slices)


def test_a_group_stays_together_and_tracks_can_be_read_twice() -> None:
    group = [one(0, 10), one(0, 4), one(4, 10)]
    first, second = in_lanes("n", [group, [one(5, 20)]])
    assert (list(first.slices()), list(first.slices())) == (group, group)
    assert [each.t0_ns for each in second.slices()] == [5]


@given(st.integers(-50, 50), st.integers(0, 50), st.integers(-50, 50), st.integers(1, 50))
def test_a_clipped_slice_lies_in_the_window_and_keeps_what_it_was(t0: int, length: int, begin: int, size: int) -> None:
    whole = one(t0, t0 + length)
    found = clipped(whole, begin, begin + size)
    if whole.t1_ns < begin or t0 >= begin + size:
        assert found is None
    else:
        assert found is not None
        assert begin <= found.t0_ns <= found.t1_ns <= begin + size
        raw = found.args.get("raw_t0_ns", found.t0_ns), found.args.get("raw_t1_ns", found.t1_ns)
        assert raw == (whole.t0_ns, whole.t1_ns)
        assert ("raw_t0_ns" in found.args) == ((found.t0_ns, found.t1_ns) != (whole.t0_ns, whole.t1_ns))
