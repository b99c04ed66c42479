"""Messages that arrive before they are sent are counted, and nothing is shifted."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.causality import Violations, shown_ns, violations

STAGES = {0: 0, 1: 1}
Row = tuple[int, int, int, IntervalClass, int, int]
"""(rank, peer, step, class, begin, end)"""


def columns(rows: list[Row]) -> dict[str, Any]:
    names = ("rank", "peer", "step", "cls", "t0", "t")
    return {name: np.array([int(row[n]) for row in rows], np.int64) for n, name in enumerate(names)}


def message(step: int, sent: int, got: int, source: int = 0, target: int = 1) -> list[Row]:
    return [
        (source, target, step, IntervalClass.SEND_XFER, sent, sent + 5),
        (target, source, step, IntervalClass.RECV_WAIT, sent - 50, got - 2),
        (target, source, step, IntervalClass.RECV_XFER, got - 2, got),
    ]


@given(st.lists(st.integers(-1_000, 1_000), min_size=1, max_size=30), st.integers(0, 300))
def test_what_arrives_before_it_was_sent_is_counted(delays: list[int], slack: int) -> None:
    rows = [row for step, delay in enumerate(delays) for row in message(step, 10_000 * step, 10_000 * step + delay)]
    np.random.default_rng(len(rows)).shuffle(rows)
    early = [-delay for delay in delays if -delay > slack]
    found = violations(columns(rows), STAGES, {(0, 1): slack})
    assert found == [Violations(0, 1, len(delays), len(early), max(early, default=0))]


def test_ids_that_go_back_name_the_step_they_make_possible() -> None:
    assert violations(columns(message(1, 100, 50, source=1, target=0)), STAGES) == []


def test_a_send_that_nobody_received_and_the_drivers_messages_say_nothing() -> None:
    rows = [message(1, 0, 10)[0], (0, -1, 2, IntervalClass.RECV_WAIT, 0, 5), (1, 0, -1, IntervalClass.RECV_XFER, 0, 5)]
    assert violations(columns(rows), STAGES) == []
    assert violations(columns([]), STAGES) == []


def test_waiting_until_the_peer_takes_it_is_part_of_the_send() -> None:
    rows = [*message(1, 100, 90), (0, 1, 1, IntervalClass.SEND_WAIT, 80, 100)]
    assert violations(columns(rows), STAGES) == [Violations(0, 1, 1, 0, 0)]


def test_what_enough_messages_show_is_the_error_of_their_two_hosts() -> None:
    rows = [row for step in range(40) for row in message(step, 1_000 * step, 1_000 * step + 20 - 3 * (step % 10 == 0))]
    early = [row for step in range(40) for row in message(step, 1_000 * step, 1_000 * step - 3 * step)]
    hosts = {0: "a", 1: "b"}
    assert shown_ns(columns(rows), STAGES, hosts, {}) == {}
    assert shown_ns(columns(early), STAGES, hosts, {}) == {frozenset("ab"): 117}
    assert shown_ns(columns(early), STAGES, hosts, {(0, 1): 200}) == {}
    assert shown_ns(columns(early[: 3 * 15]), STAGES, hosts, {}) == {}, "too few"
    assert shown_ns(columns(early), STAGES, {0: "a", 1: "a"}, {}) == {}
