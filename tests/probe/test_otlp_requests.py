"""Requests become latencies, each once, whatever rows come; what never ended is forgotten."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insitu.exporters.otlp import names
from insitu.exporters.otlp.requests import MAX_MARKS, MAX_OPEN, Ended, Latency, Mark, Requests
from insitu.vocabulary import RequestEvent


def row(request: str, event: RequestEvent, t_ns: int, num_tokens: int | None = None) -> dict[str, Any]:
    return {"request": request, "event": int(event), "t_ns": t_ns, "num_tokens": num_tokens, "step_id": 3}


def ended(rows: list[dict[str, Any]]) -> list[Ended]:
    requests = Requests()
    for each in rows:
        list(requests.take(each))
    found = requests.take_ended()
    assert requests.take_ended() == []
    return found


def latencies(rows: list[dict[str, Any]]) -> list[Latency]:
    requests = Requests()
    return [found for each in rows for found in requests.take(each)]


def test_a_request_has_three_latencies() -> None:
    rows = [
        row("a", RequestEvent.ARRIVED, 1_000_000_000, 7),
        row("a", RequestEvent.SCHEDULED, 1_100_000_000),
        row("a", RequestEvent.FIRST_TOKEN, 1_500_000_000, 1),
        row("a", RequestEvent.TOKEN, 1_700_000_000, 2),
        row("a", RequestEvent.FINISHED, 2_100_000_000, 4),
    ]
    assert latencies(rows) == [
        Latency(names.FIRST_TOKEN, "a", 0.5, 1_500_000_000),
        Latency(names.REQUEST_TIME, "a", 1.1, 2_100_000_000),
        Latency(names.TOKEN_TIME, "a", 0.2, 2_100_000_000),
    ]
    marks = (Mark("scheduled", 1_100_000_000, 3), Mark("first_token", 1_500_000_000, 3))
    assert ended(rows) == [Ended("a", 1_000_000_000, 2_100_000_000, False, 7, 4, marks)]


def test_a_request_that_is_preempted_for_ever_keeps_its_first_marks() -> None:
    rows = [row("a", RequestEvent.ARRIVED, 0), *(row("a", RequestEvent.PREEMPTED, at) for at in range(1000))]
    (found,) = ended([*rows, row("a", RequestEvent.FAILED, 1000)])
    assert [mark.t_ns for mark in found.marks] == list(range(MAX_MARKS))
    assert found.failed


def test_one_token_has_no_time_between_tokens() -> None:
    rows = [
        row("a", RequestEvent.ARRIVED, 0),
        row("a", RequestEvent.FIRST_TOKEN, 5, 1),
        row("a", RequestEvent.FAILED, 9, 1),
    ]
    assert [(found.metric, found.failed) for found in latencies(rows)] == [
        (names.FIRST_TOKEN, False),
        (names.REQUEST_TIME, True),
    ]


def test_the_oldest_request_that_never_ended_is_forgotten() -> None:
    rows = [row(f"r{number}", RequestEvent.ARRIVED, 0) for number in range(MAX_OPEN + 1)]
    rows += [row("r0", RequestEvent.FINISHED, 1, 1), row("r1", RequestEvent.FINISHED, 1, 1)]
    assert [found.request for found in latencies(rows)] == ["r1"]


events = st.tuples(st.sampled_from("abc"), st.sampled_from(RequestEvent), st.integers(0, 9))


@given(st.lists(events, max_size=30))
def test_whatever_comes_no_request_ends_more_often_than_it_arrived(drawn: list[tuple[str, RequestEvent, int]]) -> None:
    rows = [row(name, event, at, tokens) for at, (name, event, tokens) in enumerate(drawn)]
    found = latencies(rows)
    assert len(ended(rows)) == sum(latency.metric is names.REQUEST_TIME for latency in found)
    assert all(latency.seconds >= 0 for latency in found)
    for name in "abc":
        ends = sum(latency.request == name and latency.metric is names.REQUEST_TIME for latency in found)
        assert ends <= sum(each[0] == name and each[1] is RequestEvent.ARRIVED for each in drawn)
