"""Who waits for a place in a batch: told from who runs and who waits for memory, of one's own replica."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_kit import requests

from insitu.vocabulary import RequestEvent, VerdictKind
from insitu_collector.evidence import Evidence, Tables
from insitu_collector.judge.judgement import Judgement
from insitu_collector.requests.waiting import num_queued
from insitu_collector.rows.slices import Groups, seconds
from insitu_collector.simulate import RUN, Fault, Scenario, simulate
from insitu_collector.verdicts.pipeline_underfilled import MIN_GAIN
from insitu_collector.whatif.predict import recorded_graph
from insitu_collector.whatif.report import ask

MS = 1_000_000
BUSY = Scenario(seed=1, seconds=15.0, base_ms=(9.0, 10.0), in_flight=1, requests_per_s=20.0)
Lives = dict[str, dict[RequestEvent, int]]


def first_times(evidence: Evidence) -> Lives:
    rows = evidence.requests.between(0)
    found: Lives = {}
    for name, number, t in zip(*(rows[of].tolist() for of in ("request", "event", "t")), strict=True):
        life, event = found.setdefault(name, {}), RequestEvent(number)
        life[event] = min(t, life.get(event, t))
    return found


def counted(lives: Lives, at: np.ndarray) -> float:
    """The mean over moments of how many have arrived and run not yet; none while anybody waits for memory."""
    num, short = np.zeros(len(at)), np.zeros(len(at), bool)
    for life in lives.values():
        ends = [life[event] for event in (RequestEvent.SCHEDULED, RequestEvent.FINISHED) if event in life]
        end, starved = min(ends, default=2**62), life.get(RequestEvent.KV_WAIT, 2**62)
        num += (at >= life[RequestEvent.ARRIVED]) & (at < min(end, starved))
        short |= (at >= starved) & (at < end)
    return float(np.mean(num * ~short))


def taken(tables: Tables) -> tuple[Evidence, tuple[int, int]]:
    """The evidence, and from when to when its step graph is."""
    evidence = Evidence()
    evidence.add(tables)
    graph = recorded_graph(evidence, 0, evidence.now_ns)
    assert graph is not None
    return evidence, (int(graph.begin_ns[0, 0]), int(graph.begin_ns[-1, 0]))


moments = st.lists(st.integers(0, 40), min_size=4, max_size=4).map(sorted)


@given(st.lists(st.tuples(moments, st.booleans(), st.integers(2, 4)), max_size=12))
def test_it_is_what_counting_at_every_moment_gives(drawn: list[tuple[list[int], bool, int]]) -> None:
    """arrived, (kv_wait), scheduled, finished; of some the end is not on record."""
    lives: Lives = {}
    for n, ((arrived, starved, scheduled, finished), is_short, known) in enumerate(drawn):
        events = [(RequestEvent.ARRIVED, arrived), (RequestEvent.KV_WAIT, starved)]
        events += [(RequestEvent.SCHEDULED, scheduled), (RequestEvent.FINISHED, finished)]
        lives[f"r{n}"] = {event: t * MS for event, t in events[:known] if is_short or event is not RequestEvent.KV_WAIT}
    evidence = Evidence()
    evidence.add({"requests": requests((name, int(e), t) for name, life in lives.items() for e, t in life.items())})
    at = np.arange(10 * MS + MS // 2, 30 * MS, MS)
    assert num_queued(evidence, 10 * MS, 30 * MS) == pytest.approx(counted(lives, at))


@pytest.mark.parametrize("per_s", [4.0, 30.0])
def test_only_who_waits_for_a_place_is_counted(per_s: float) -> None:
    evidence, span = taken(simulate(replace(BUSY, requests_per_s=per_s)))
    found = num_queued(evidence, *span)
    assert found == pytest.approx(counted(first_times(evidence), np.linspace(*span, 2000)), rel=0.05, abs=0.05)
    assert (found > 20) is (per_s > 20)


def test_those_of_another_replica_are_not_counted() -> None:
    """Eleven a second fill a replica, so some wait for a place in each."""
    tables = simulate(replace(BUSY, replicas=2, requests_per_s=11.0))
    for replica in (0, 1):
        evidence, span = taken(Groups().sort(tables)[RUN, replica])
        lives = {name: of for name, of in first_times(evidence).items() if RequestEvent.SCHEDULED in of}
        mine = {name: of for name, of in lives.items() if name.startswith("req-r1-") is (replica == 1)}
        at = np.linspace(*span, 2000)
        assert num_queued(evidence, *span) == pytest.approx(counted(mine, at), rel=0.05, abs=0.05)
        assert counted(lives, at) > 1.3 * counted(mine, at) > 0.5


def test_where_memory_is_short_no_change_promises_what_the_verdict_refuses() -> None:
    """Those behind who waits for memory would not run in another slot either."""
    plenty = replace(BUSY, base_ms=(9.0, 9.0, 9.0), in_flight=2, requests_per_s=30.0)
    short = simulate(replace(plenty, faults=(Fault("kv_small", size=200),)))
    assert short["requests"]["event"].to_pylist().count(int(RequestEvent.KV_WAIT)) > 10
    judgement = Judgement()
    told = {verdict.kind for part in seconds(short) for verdict in judgement.look(part)}
    assert told == {VerdictKind.HEALTHY}
    found = ask(short, ["in-flight=3"]).prediction
    assert found.gain <= max(MIN_GAIN, found.residual)


def test_where_memory_is_there_the_same_change_gains() -> None:
    tables = simulate(replace(BUSY, base_ms=(9.0, 9.0, 9.0), in_flight=2, requests_per_s=30.0))
    assert ask(tables, ["in-flight=3"]).prediction.gain > 0.1
