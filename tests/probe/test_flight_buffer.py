"""What is held stays within its bound; what an incident wants is not let go of; rows find their requests."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.flight.buffer import PIECES, Buffer, Canaries, FullSteps, Window, whose
from insitu.session.row_map import AXES, Rows, places
from insitu.slabs.harvest import Captures

NUM_SITES = 4


def canaries(first: int, count: int, num_sites: int = NUM_SITES) -> Canaries:
    """Steps `first ..` that began at as many ns, canaries counted up."""
    step = np.arange(first, first + count, dtype=np.int64)
    values = np.arange(count * num_sites, dtype=np.float32).reshape(count, num_sites)
    return Canaries(step, step.copy(), values, np.ones((count, num_sites), bool))


def steps_of(parts: Sequence[Canaries]) -> list[int]:
    return [step for part in parts for step in part.step_id.tolist()]


parts = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=20)
windows = st.lists(st.tuples(st.integers(0, 800), st.integers(0, 800)).map(lambda w: (min(w), max(w))), max_size=3)


@given(parts=parts, windows=windows, max_bytes=st.integers(2_000, 60_000), budget=st.integers(0, 50_000))
@settings(max_examples=200)
def test_nothing_is_held_beyond_the_bound_and_nothing_is_lost_unsaid(
    parts: list[tuple[int, int]], windows: list[Window], max_bytes: int, budget: int
) -> None:
    buffer, at, refused = Buffer[Canaries](max_bytes), 0, list[int]()
    for count, num_sites in parts:
        refused += buffer.add(canaries(at, count, num_sites), windows)
        at += count
        assert buffer.num_bytes <= buffer.peak_bytes <= max_bytes
        assert buffer.num_bytes == sum(part.num_bytes for part in buffer._parts)
    assert len(buffer) + len(refused) + buffer.num_let_go == at
    held = steps_of(list(buffer._parts))
    assert held == sorted(held)
    wanted = [step for step in range(at) if any(begin <= step <= end for begin, end in windows)]
    taken = list[int]()
    while buffer.wants(windows):
        some = steps_of(buffer.take(windows, budget))
        assert some, "however small the budget, it goes on"
        taken += some
    assert taken == [step for step in held if step in wanted]
    assert steps_of(list(buffer._parts)) == [step for step in held if step not in wanted]
    assert buffer.num_bytes == sum(part.num_bytes for part in buffer._parts) <= max_bytes


def test_what_is_counted_is_what_is_allocated() -> None:
    """By the allocators of Python, numpy and Arrow; what is counted beside the values may be more, never less."""
    buffer = Buffer[FullSteps](4 << 20)
    gc.collect()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for number in range(40):
            buffer.add(full_steps([None] * 4, num_rows=50 + number, width=256))
        gc.collect()
        allocated = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
    finally:
        tracemalloc.stop()
    assert buffer.num_let_go > 0
    assert 0.8 * buffer.num_bytes < allocated <= buffer.num_bytes


def test_what_an_incident_wants_is_kept_and_what_is_newer_refused() -> None:
    one = canaries(0, 10).num_bytes
    buffer = Buffer[Canaries](one * PIECES)
    for first in range(0, 10 * PIECES, 10):
        assert buffer.add(canaries(first, 10)) == []
    window = (0, 10 * PIECES)
    assert buffer.add(canaries(10 * PIECES, 10), [window]) == list(range(10 * PIECES, 10 * PIECES + 10))
    assert buffer.add(canaries(10 * PIECES, 10)) == []
    assert steps_of(list(buffer._parts))[0] == 10, "the oldest made room"


def test_what_is_old_is_forgotten_unless_it_is_wanted() -> None:
    buffer = Buffer[Canaries](1 << 20)
    for first in range(0, 50, 10):
        buffer.add(canaries(first, 10))
    buffer.forget(25, [(12, 13)])
    assert steps_of(list(buffer._parts)) == [*range(10, 20), *range(20, 50)]
    buffer.forget(25)
    assert steps_of(list(buffer._parts)) == [*range(20, 50)]


def test_canaries_become_rows_of_inner_sites() -> None:
    part = canaries(7, 2)
    part.untold[0, 1:] = False
    found = part.summaries()
    assert (found.step_id.tolist(), found.site.tolist()) == ([7, 8, 8, 8, 8], [0, 0, 1, 2, 3])
    assert found.canary.tolist() == [0, 4, 5, 6, 7]
    assert not found.at_boundary.any()
    assert len(found.bad) == 0


@st.composite
def row_maps(draw: st.DrawFn) -> list[Rows] | None:
    """A row map whose entries do not overlap, in any order, or none."""
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    entries, at = [], 0
    for number in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, 2))
        count, position = draw(st.integers(0, 4)), draw(st.integers(0, 50))
        sample = draw(st.sampled_from((-1, number)))
        entries.append(Rows(f"r{number}", at, count, position, sample_row=sample))
        at += count
    return draw(st.permutations(entries))


@given(maps=st.lists(row_maps(), min_size=1, max_size=4), axis=st.sampled_from(AXES), seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None)  # the first conversion of Python objects imports what pyarrow finds
def test_whose_rows_are_is_what_the_row_map_says_a_row_at_a_time(
    maps: list[list[Rows] | None], axis: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    step, row = rng.integers(0, len(maps), 40), rng.integers(0, 20, 40)
    request, position = whose(step, row, maps, axis)
    said = [{p.row: (p.request, p.position) for _, p in places(rows or (), axis, 0)} for rows in maps]
    expected = [said[s].get(r, (None, -1)) for s, r in zip(step.tolist(), row.tolist(), strict=True)]
    assert list(zip(request.to_pylist(), position.tolist(), strict=True)) == expected


def full_steps(maps: list[list[Rows] | None], num_rows: int, width: int = 2) -> FullSteps:
    """Steps 10, 11, ... with `num_rows` rows each at two sites; the bytes of a row say step and row."""
    count = len(maps)
    step, row = np.repeat(np.arange(10, 10 + count), num_rows), np.tile(np.arange(num_rows), count)
    data = np.zeros((len(row), width), np.uint8)
    data[:, 0], data[:, 1] = step, row

    def rows_of(site: int) -> Captures:
        nobody = pa.nulls(len(row), pa.utf8())
        return Captures(site, "uint8", width, step.copy(), nobody, row.copy(), np.full(len(row), -1), data.copy())

    ids = np.arange(10, 10 + count)
    return FullSteps(ids, ids * 100, tuple(maps), (rows_of(0), rows_of(1)), {0: "tokens", 1: "samples"})


def test_rows_are_named_when_they_are_shipped_and_those_of_nobody_left_out() -> None:
    stated = [Rows("a", 0, 2, 5, sample_row=0), Rows("b", 3, 1, 9)]
    tokens, samples = full_steps([stated, None], num_rows=5).named()
    assert tokens.request.to_pylist() == ["a", "a", "b", None, None, None, None, None]
    assert tokens.position.tolist() == [5, 6, 9, -1, -1, -1, -1, -1]
    assert tokens.data.tolist() == [[10, 0], [10, 1], [10, 3], *([11, row] for row in range(5))]
    assert samples.request.to_pylist()[:2] == ["a", None]
    assert samples.position.tolist()[0] == 6, "the last token of what was computed"


def test_some_of_the_steps_are_a_copy_of_those_alone() -> None:
    part = full_steps([None, None, None], num_rows=4)
    some = part.where(np.array([False, True, False]))
    assert (some.step_id.tolist(), some.t_ns.tolist(), len(some.maps)) == ([11], [1100], 1)
    assert {capture.step_id.tolist()[0] for capture in some.captures} == {11}
    assert all(capture.data.base is None for capture in some.captures), "else the whole would stay in memory"
    assert part.num_bytes > some.num_bytes > part.num_bytes / 6
