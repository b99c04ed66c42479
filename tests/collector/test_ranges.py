"""`Ranges` behaves as a set of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.rows.ranges import Ranges

NUMBERS = st.integers(0, 40)
ADD = st.tuples(st.just("add"), NUMBERS, NUMBERS)
DISCARD = st.tuples(st.just("discard"), NUMBERS, NUMBERS)

CUT = st.tuples(st.just("cut"), NUMBERS, NUMBERS)


@given(st.lists(ADD | DISCARD | CUT, max_size=30))
def test_it_is_the_set_that_the_same_calls_make(calls: list[tuple[str, int, int]]) -> None:
    ranges, model = Ranges(), set[int]()
    for what, a, b in calls:
        if what == "add":
            ranges.add(min(a, b), max(a, b))
            model |= set(range(min(a, b), max(a, b)))
        elif what == "cut":
            ranges.cut(a)
            model = {number for number in model if number < a}
        else:
            ranges.discard(a)
            model.discard(a)
    found = [number for start, end in ranges.ranges for number in range(start, end)]
    assert found == sorted(model)
    assert all(end < start for (_, end), (start, _) in zip(ranges.ranges, ranges.ranges[1:], strict=False))
    assert bool(ranges) == bool(model)
    for number in range(42):
        above = sorted(n for n in model if n >= number)
        assert (number in ranges) == (number in model)
        assert ranges.start_after(number) == (above[0] if above else None)
        assert ranges.end_after(number) == next(n for n in range(number, 50) if n not in model)
        for end in range(number + 1, 42):
            assert ranges.overlaps(number, end) == bool(model & set(range(number, end)))
