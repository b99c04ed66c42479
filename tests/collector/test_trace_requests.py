"""Requests as slices, and the counters beside them."""

from __future__ import annotations

import pyarrow as pa
from record_kit import requests

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.export.requests import Life, lives, request_counters, request_slices, without_tokens

E = RequestEvent


def found(*events: tuple[str, RequestEvent, int], tokens: int | None = None) -> list[Life]:
    table = requests(events, num_tokens=tokens)
    return lives(
        pa.Table.from_batches([without_tokens(batch) for batch in table.to_batches()], table.schema), Timeline()
    )


def drawn(life: Life, begin: int = 0, end: int = 1000) -> list[tuple[str, int, int]]:
    return [(each.name, each.t0_ns, each.t1_ns) for each in request_slices(life, begin, end)]


def test_phases_follow_the_events_and_lie_inside_the_request() -> None:
    (life,) = found(
        ("a", E.ARRIVED, 10),
        ("a", E.QUEUED, 10),
        ("a", E.KV_WAIT, 20),
        ("a", E.SCHEDULED, 30),
        ("a", E.FIRST_TOKEN, 50),
        ("a", E.TOKEN, 55),
        ("a", E.PREEMPTED, 60),
        ("a", E.RESUMED, 80),
        ("a", E.FINISHED, 90),
        tokens=4,
    )
    assert drawn(life) == [
        ("a", 10, 90),
        ("queue", 10, 20),
        ("kv_wait", 20, 30),
        ("prefill", 30, 50),
        ("decode", 50, 60),
        ("preempted", 60, 80),
        ("decode", 80, 90),
    ]
    assert request_slices(life, 0, 1000)[0].args == {"outcome": "finished", "prompt_tokens": 4, "tokens": 4}


def test_a_request_of_which_only_begin_and_end_are_known_has_no_phases() -> None:
    (life,) = found(("a", E.ARRIVED, 10), ("a", E.FAILED, 90))
    assert drawn(life) == [("a", 10, 90)]
    assert request_slices(life, 0, 1000)[0].args == {"outcome": "failed"}


def test_a_request_that_still_runs_reaches_to_the_end_and_one_without_arrival_says_so() -> None:
    (life,) = found(("a", E.SCHEDULED, 30))
    assert drawn(life, 0, 100) == [("a", 30, 100), ("prefill", 30, 100)]
    assert request_slices(life, 0, 100)[0].args == {"outcome": "still running", "begin": "not recorded"}


def test_a_window_clips_requests_and_leaves_out_others() -> None:
    early, late = found(("a", E.ARRIVED, 10), ("b", E.ARRIVED, 20), ("a", E.FINISHED, 15), ("b", E.FINISHED, 200))
    assert drawn(early, 50, 100) == []
    assert drawn(late, 50, 100) == [("b", 50, 100)]


def test_counters_step_with_requests_and_those_waiting_only_where_it_is_known() -> None:
    two = found(("a", E.ARRIVED, 10), ("b", E.ARRIVED, 20), ("a", E.FINISHED, 30), ("b", E.FINISHED, 30))
    (in_flight,) = request_counters(two, 0, 100)
    assert list(zip(in_flight.t_ns, in_flight.value, strict=True)) == [(10, 1), (20, 2), (30, 0)]
    scheduled = found(("a", E.ARRIVED, 10), ("a", E.SCHEDULED, 25), ("b", E.ARRIVED, 20), ("b", E.FAILED, 40))
    in_flight, waiting = request_counters(scheduled, 15, 100)
    assert list(zip(in_flight.t_ns, in_flight.value, strict=True)) == [(15, 1), (20, 2), (40, 1)]
    assert list(zip(waiting.t_ns, waiting.value, strict=True)) == [(15, 1), (20, 2), (25, 1), (40, 0)]


def test_events_of_one_moment_stand_in_the_order_of_a_life() -> None:
    (life,) = found(("a", E.FINISHED, 10), ("a", E.SCHEDULED, 10), ("a", E.KV_WAIT, 10), ("a", E.ARRIVED, 10))
    assert [event for _, event, _ in life.events] == [E.ARRIVED, E.KV_WAIT, E.SCHEDULED, E.FINISHED]
    assert drawn(life)[0] == ("a", 10, 10)
