"""The delay matrix: which link, sender, receiver or rank is slow, and who keeps whom waiting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import IntervalClass
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.collectives import by_step, collectives_of, groups
from insitu_collector.steps.delay_matrix import FaultClass, delay_matrix, hang_class, patterns
from insitu_collector.steps.delay_words import to_json, to_lines

MS = 1_000_000
NAMES = ("rank", "peer", "cls", "step", "t0", "t", "bytes")


def columns(rows: Sequence[tuple[int, ...]]) -> Columns:
    return dict(zip(NAMES, np.array(rows, np.int64).reshape(-1, len(NAMES)).T, strict=True))


def messages(links: dict[tuple[int, int], float], *, num: int = 30, seed: int = 0, size: int = 4096) -> Columns:
    """Messages of each (source, destination), which take so many ms at the receiver and 0.1 ms at the sender."""
    random = np.random.default_rng(seed)
    rows = []
    for (source, target), ms in links.items():
        for n in range(num):
            t0 = n * 20 * MS
            got = int(ms * MS * random.lognormal(0, 0.2))
            rows.append((source, target, int(IntervalClass.SEND_XFER), n, t0, t0 + MS // 10, size))
            rows.append((target, source, int(IntervalClass.RECV_XFER), n, t0, t0 + got, size))
    return columns(rows)


def all_links(num_ranks: int, slow: set[tuple[int, int]], ms: float = 5.0) -> dict[tuple[int, int], float]:
    return {link: ms if link in slow else 0.3 for link in permutations(range(num_ranks), 2)}


@pytest.mark.parametrize("num_ranks", [3, 4, 6])
@pytest.mark.parametrize("kind", ["none", "link", "sender", "receiver", "rank"])
def test_what_slow_links_have_in_common_is_named(num_ranks: int, kind: str) -> None:
    links = list(permutations(range(num_ranks), 2))
    slow = {
        "none": set(),
        "link": {(1, 2)},
        "sender": {link for link in links if link[0] == 1},
        "receiver": {link for link in links if link[1] == 1},
        "rank": {link for link in links if 1 in link},
    }[kind]
    found = patterns(delay_matrix(messages(all_links(num_ranks, slow)), dict.fromkeys(range(num_ranks), 0)))
    expected = [] if kind == "none" else [(kind, 1, 2 if kind == "link" else None)]
    assert [(pattern.kind, pattern.rank, pattern.peer) for pattern in found] == expected
    assert all(pattern.delay_ns == pytest.approx(4.7 * MS, rel=0.15) for pattern in found)


def test_a_slower_message_of_another_size_is_no_slow_link() -> None:
    small, large = messages({(0, 1): 0.3, (1, 2): 0.3}), messages({(2, 0): 9.0}, size=1 << 22)
    both = {name: np.concatenate([small[name], large[name]]) for name in NAMES}
    matrix = delay_matrix(both, {0: 0, 1: 1, 2: 2})
    assert patterns(matrix) == []
    assert np.isnan(matrix.transfer_ns[2, 0])
    assert matrix.num_messages[2, 0] == 30


def test_few_messages_are_no_slow_link() -> None:
    matrix = delay_matrix(messages({(0, 1): 0.3, (1, 2): 9.0}, num=19), {0: 0, 1: 1, 2: 2})
    assert patterns(matrix) == []


def test_waits_are_laid_to_whom_they_wait_for() -> None:
    wait, back, meet = (
        int(cls) for cls in (IntervalClass.RECV_WAIT, IntervalClass.SEND_WAIT, IntervalClass.COLLECTIVE_WAIT)
    )
    rows = [
        (2, 0, wait, 5, 0, 3 * MS, 0),
        (0, 2, back, 5, 0, 2 * MS, 0),
        (1, -1, wait, 5, 0, 9 * MS, 0),  # the driver is no rank
        (2, -1, meet, 5, 10 * MS, 11 * MS, 0),
        (3, -1, meet, 5, 6 * MS, 11 * MS, 0),
    ]
    waiting = delay_matrix(columns(rows), {0: 0, 1: 0, 2: 1, 3: 1}).waiting_ns / MS
    expected = np.zeros((4, 4))
    expected[0, 2], expected[2, 0], expected[2, 3] = 3, 2, 4
    assert waiting.tolist() == expected.tolist()


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=40),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_lateness_is_found_whatever_order_rows_come_in(arrivals: list[list[int]], a_step: int, random: object) -> None:
    """Three ranks arrive; all leave 1 ms after the last. Lateness against the others' median, and the last of them."""
    rows = []
    for n, came in enumerate(arrivals):
        base = n * 1000 * MS
        rows += [
            (rank, -1, int(IntervalClass.COLLECTIVE_WAIT), n // a_step, base + ms * MS, base + (max(came) + 1) * MS, 0)
            for rank, ms in enumerate(came)
        ]
    random.shuffle(rows)  # type: ignore[attr-defined]
    found = collectives_of(columns(rows), (0, 1, 2))
    came_ms = np.array(arrivals, float)
    late = np.stack([came_ms[:, at] - np.median(np.delete(came_ms, at, 1), axis=1) for at in range(3)], axis=1)
    np.testing.assert_allclose(found.lateness_ns() / MS, late, atol=1e-6)
    assert (came_ms[np.arange(len(found)), found.late] == came_ms.max(axis=1)).all()
    held = np.stack([came_ms[:, at] - np.delete(came_ms, at, 1).max(axis=1) for at in range(3)], axis=1)
    np.testing.assert_allclose(found.held_ns() / MS, held, atol=1e-6)
    steps, _, total = by_step(found, found.lateness_ns())
    assert steps.tolist() == sorted({n // a_step for n in range(len(arrivals))})
    np.testing.assert_allclose(total.sum(axis=0) / MS, late.sum(axis=0), atol=1e-6)


def test_a_step_that_not_all_ranks_count_alike_is_left_out() -> None:
    meet = int(IntervalClass.COLLECTIVE_WAIT)
    rows = [(rank, -1, meet, step, step * MS, (step + 1) * MS, 0) for rank in (0, 1) for step in (1, 2, 3)]
    rows.append((1, -1, meet, 2, 3 * MS, 4 * MS, 0))
    assert collectives_of(columns(rows), (0, 1)).step.tolist() == [1, 3]
    assert len(collectives_of(columns([]), (0, 1))) == 0


def test_only_stages_of_several_ranks_meet() -> None:
    assert groups({0: 0, 1: 1, 2: 1, 3: 0, 4: 2}) == [(0, 3), (1, 2)]


@pytest.mark.parametrize("cls", [None, *IntervalClass])
def test_a_hang_inside_a_transport_is_one_of_communication(cls: IntervalClass | None) -> None:
    inside = cls is not None and cls.name.startswith(("RECV", "SEND", "COLLECTIVE"))
    assert hang_class(cls) is (FaultClass.COMMUNICATION_HANG if inside else FaultClass.OTHER_HANG)


def test_people_and_programs_get_the_same_matrix() -> None:
    matrix = delay_matrix(messages(all_links(3, {(1, 2)})), {0: 0, 1: 1, 2: 2})
    answer, lines = to_json(matrix), to_lines(matrix)
    assert answer["ranks"] == [0, 1, 2]
    assert answer["transfer_excess_ms"][0][0] is None
    assert answer["transfer_excess_ms"][1][2] == pytest.approx(4.7, rel=0.15)
    assert f"{answer['transfer_excess_ms'][1][2]:.2f}" in "\n".join(lines)
    (pattern,) = answer["patterns"]
    assert pattern["text"] == lines[-1]
    assert "the link from rank 1 to rank 2 is slow" in lines[-1]
