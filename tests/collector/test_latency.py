"""What requests felt: first tokens, gaps between tokens, what still runs; warm-up is left out, memory is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_kit import requests

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.requests.latency import (
    KEEP_S,
    KEEP_SAMPLES_S,
    SECOND_NS,
    Latency,
    Percentiles,
    Second,
    percentiles,
    timed_samples,
)

Event = tuple[str, RequestEvent, float]


def fed(*events: Event) -> Latency:
    found = Latency()
    found.add(requests((name, event, round(t_s * SECOND_NS)) for name, event, t_s in events), Timeline())
    return found


def test_times_are_those_between_a_requests_own_events() -> None:
    found = fed(
        ("a", RequestEvent.ARRIVED, 1.0),
        ("b", RequestEvent.ARRIVED, 1.1),
        ("a", RequestEvent.FIRST_TOKEN, 1.3),
        ("b", RequestEvent.FIRST_TOKEN, 1.6),
        ("a", RequestEvent.TOKEN, 1.7),
        ("a", RequestEvent.TOKEN, 2.2),
        ("a", RequestEvent.FINISHED, 2.2),
        ("b", RequestEvent.FAILED, 2.9),
    )
    assert found.seconds[1].ttft_s == pytest.approx([0.3, 0.5])
    assert found.seconds[1].itl_s == pytest.approx([0.4])
    assert found.seconds[2].itl_s == pytest.approx([0.5])
    assert (found.seconds[2].num_finished, found.seconds[2].num_failed, found.num_running) == (1, 1, 0)
    assert [found.seconds[n].num_tokens for n in (1, 2)] == [3, 1]


def test_warm_up_is_no_traffic() -> None:
    found = fed(("warmup-0", RequestEvent.ARRIVED, 0.0), ("warmup-0", RequestEvent.FIRST_TOKEN, 0.5))
    assert found.seconds == {}
    assert found.num_running == 0


def test_a_request_that_arrived_before_the_record_gives_no_first_token_time() -> None:
    found = fed(("a", RequestEvent.FIRST_TOKEN, 1.0), ("a", RequestEvent.TOKEN, 1.2), ("a", RequestEvent.FINISHED, 1.3))
    assert found.seconds[1].ttft_s == []
    assert found.seconds[1].num_tokens == 2


def test_old_seconds_keep_their_percentiles_and_very_old_ones_go() -> None:
    found = fed(
        ("a", RequestEvent.ARRIVED, 0.0),
        ("a", RequestEvent.FIRST_TOKEN, 0.25),
        ("a", RequestEvent.TOKEN, KEEP_SAMPLES_S + 5.0),
    )
    assert 0 not in found.seconds
    kept = found.at(0)
    assert kept == (Percentiles(0.25, 0.25, None, None), 1)
    assert found.at(1) is None
    late = fed(("a", RequestEvent.TOKEN, 0.0), ("a", RequestEvent.TOKEN, KEEP_S + 10.0))
    assert late.at(0) is None


@given(samples=st.lists(st.floats(0, 100), min_size=1, max_size=50), cut=st.integers(0, 50))
def test_percentiles_are_of_all_samples_however_they_fall_into_seconds(samples: list[float], cut: int) -> None:
    split = percentiles([Second(ttft_s=samples[:cut]), Second(ttft_s=samples[cut:])])
    assert split == percentiles([Second(ttft_s=samples)])
    assert split.ttft_p50_s is not None and min(samples) <= split.ttft_p50_s <= max(samples)
    assert percentiles([]) == Percentiles()


def test_samples_of_a_whole_table_say_when_they_ended() -> None:
    events = [
        ("warmup-1", RequestEvent.ARRIVED, 0),
        ("warmup-1", RequestEvent.FIRST_TOKEN, 1),
        ("a", RequestEvent.ARRIVED, 10),
        ("a", RequestEvent.SCHEDULED, 15),
        ("a", RequestEvent.FIRST_TOKEN, 30),
        ("b", RequestEvent.FIRST_TOKEN, 31),  # its arrival is not there
        ("a", RequestEvent.TOKEN, 36),
        ("a", RequestEvent.TOKEN, 46),
    ]
    first, between, num_tokens = timed_samples(requests(events), Timeline(0, {1: 1_000}))
    assert (first.t_ns.tolist(), (first.seconds * 1e9).tolist()) == ([1_030], [pytest.approx(20)])
    assert between.t_ns.tolist() == [1_036, 1_046]
    assert (between.seconds * 1e9).tolist() == pytest.approx([6, 10])
    assert num_tokens == 4
