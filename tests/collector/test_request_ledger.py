"""The request ledger: one class for each nanosecond of a life, whatever the record holds; never a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass, Phase, RequestClass, RequestEvent
from insitu_collector.evidence import Evidence
from insitu_collector.requests.ledger import CLASSES, RequestLedger
from insitu_collector.requests.records import RequestRecords, records_of_evidence, records_of_tables
from insitu_collector.requests.times import RequestTimes, request_ledger
from insitu_collector.rows.slices import Groups, latest
from insitu_collector.rows.tape import Columns
from insitu_collector.simulate import MS, Fault, Scenario, simulate

C, E, K = IntervalClass, RequestEvent, RequestClass


def columns(names: str, rows: list[tuple[Any, ...]]) -> Columns:
    found = {}
    for place, name in enumerate(names.split()):
        values = [row[place] for row in rows]
        found[name] = np.array(values, object if name == "request" else np.int64)
    return found


def records(
    events: list[tuple[Any, ...]],
    entries: list[tuple[Any, ...]] = [],  # noqa: B006
    intervals: list[tuple[Any, ...]] = [],  # noqa: B006
    *,
    until: int = 1000,
    num_ranks: int = 2,
    lossy: bool = False,
) -> RequestRecords:
    """events: (request, event, t, step); entries: (request, step, position, count, phase, t); intervals:
    (rank, t0, t1, class, step, peer)."""
    return RequestRecords(
        columns("request event t step", events),
        columns("request step position count phase t", entries),
        columns("rank t0 t cls step peer", intervals),
        {rank: rank for rank in range(num_ranks)},
        until,
        lossy,
    )


def life(ledger: RequestLedger, name: str) -> list[tuple[int, RequestClass]]:
    """Return a request's classes as (ns, class), neighbours of one class joined."""
    at = ledger.names.index(name)
    mine = ledger.spans["at"] == at
    found: list[tuple[int, RequestClass]] = []
    for begin, end, cls in zip(*(ledger.spans[key][mine].tolist() for key in ("begin", "end", "cls")), strict=True):
        if found and found[-1][1] is CLASSES[cls]:
            found[-1] = found[-1][0] + end - begin, CLASSES[cls]
        else:
            found.append((end - begin, CLASSES[cls]))
    return found


EVENTS = [
    ("a", E.ARRIVED, 0, -1),
    ("a", E.QUEUED, 1, -1),
    ("a", E.KV_WAIT, 20, -1),
    ("a", E.SCHEDULED, 100, 7),
    ("a", E.FIRST_TOKEN, 165, 7),
    ("a", E.TOKEN, 265, 9),
    ("a", E.FINISHED, 270, 9),
]
ENTRIES = [("a", 7, 0, 5, Phase.PREFILL, 120), ("a", 9, 5, 1, Phase.DECODE, 200)]
INTERVALS = [
    (0, 90, 120, C.COMPUTE, 6, -1),
    (0, 120, 140, C.COMPUTE, 7, -1),
    (0, 140, 190, C.RECV_WAIT, 9, 1),
    (0, 190, 200, C.HOST, 9, -1),
    (0, 200, 220, C.COMPUTE, 9, -1),
    (0, 220, 300, C.IDLE, -1, -1),
    (1, 90, 120, C.COMPUTE, 6, -1),
    (1, 120, 150, C.GC, 6, -1),
    (1, 150, 160, C.COMPUTE, 7, -1),
    (1, 160, 230, C.RECV_WAIT, 9, 0),
    (1, 230, 260, C.COMPUTE, 9, -1),
    (1, 260, 300, C.RECV_WAIT, -1, 0),
]


def test_a_life_from_queue_to_last_token() -> None:
    ledger = request_ledger(records(EVENTS, ENTRIES, INTERVALS))
    assert life(ledger, "a") == [
        (20, K.QUEUE),
        (80, K.KV_WAIT),
        (20, K.PIPELINE_WAIT),  # the first rank computes another step
        (20, K.PREFILL),
        (10, K.PIPELINE_WAIT),  # the second is held by its collector
        (10, K.PREFILL),
        (30, K.PIPELINE_WAIT),
        (30, K.DECODE),  # what the first rank prepares for the step is work for it
        (10, K.PIPELINE_WAIT),
        (30, K.DECODE),
        (10, K.OTHER),  # on its way to the driver
    ]
    assert ledger.waits() == {(0, "compute"): 20, (0, "wait_downstream"): 30, (1, "gc"): 10, (1, "wait_upstream"): 10}
    assert (ledger.arrived.tolist(), ledger.ended.tolist(), ledger.first_token_ns.tolist()) == ([True], [True], [165])


@pytest.mark.parametrize("order", [-1, 1])
def test_the_order_of_rows_does_not_matter(order: int) -> None:
    shuffled = request_ledger(records(EVENTS[::order], ENTRIES[::order], INTERVALS[::order]))
    assert life(shuffled, "a") == life(request_ledger(records(EVENTS, ENTRIES, INTERVALS)), "a")


def without(rows: list[tuple[Any, ...]], *gone: int) -> list[tuple[Any, ...]]:
    return [row for place, row in enumerate(rows) if place not in gone]


def test_what_is_not_on_record_is_other() -> None:
    lost_step = request_ledger(records(EVENTS, ENTRIES[:1], INTERVALS))
    assert life(lost_step, "a")[-1] == (110, K.OTHER), "its second step is unknown, so what ranks did meanwhile is too"
    lost_rank = request_ledger(records(EVENTS, ENTRIES, without(INTERVALS, 7)))
    assert life(lost_rank, "a")[4] == (10, K.OTHER), "nobody knows what the second rank did"
    unscheduled = request_ledger(records(without(EVENTS, 3), ENTRIES, INTERVALS))
    assert life(unscheduled, "a")[:3] == [(20, K.QUEUE), (100, K.OTHER), (20, K.PREFILL)]
    unborn = request_ledger(records(EVENTS[3:], ENTRIES, INTERVALS))
    assert (unborn.begin_ns.tolist(), unborn.arrived.tolist()) == ([100], [False])
    jumped = request_ledger(records(EVENTS, [ENTRIES[0], ("a", 9, 6, 1, Phase.DECODE, 200)], INTERVALS))
    assert life(jumped, "a")[6] == (40, K.OTHER), "a token is missing, so a step is"


def test_a_request_that_failed_did_not_queue_once_it_had_tokens() -> None:
    events = [EVENTS[0], EVENTS[4], ("a", E.FAILED, 270, -1)]
    assert life(request_ledger(records(events)), "a") == [(270, K.OTHER)]
    assert life(request_ledger(records([EVENTS[0], events[2]], ENTRIES[:1])), "a") == [(270, K.OTHER)]


def test_contradictions_are_other() -> None:
    early = [*without(EVENTS, 3), ("a", E.SCHEDULED, 130, 7)]
    found = life(request_ledger(records(early, ENTRIES, INTERVALS)), "a")
    assert found[:4] == [(20, K.QUEUE), (100, K.KV_WAIT), (10, K.OTHER), (10, K.PREFILL)], "it ran while it waited"


def test_events_of_a_newer_version_explain_nothing() -> None:
    newer = request_ledger(records([*EVENTS, ("a", 77, 60, -1)], ENTRIES, INTERVALS))
    assert life(newer, "a")[:3] == [(20, K.QUEUE), (80, K.OTHER), (20, K.PIPELINE_WAIT)]
    phase = request_ledger(records(EVENTS, [ENTRIES[0], ("a", 9, 5, 1, 9, 200)], INTERVALS))
    assert K.DECODE not in {cls for _, cls in life(phase, "a")}


def test_a_preempted_request_waits_until_it_resumes() -> None:
    events = [*EVENTS[:5], ("a", E.PREEMPTED, 165, -1), ("a", E.RESUMED, 185, 9), *EVENTS[5:]]
    entries = [ENTRIES[0], ("a", 9, 0, 6, Phase.PREFILL, 200)]
    found = life(request_ledger(records(events, entries, INTERVALS)), "a")
    assert found[6:] == [
        (5, K.OTHER),
        (20, K.PREEMPTED),
        (5, K.PIPELINE_WAIT),
        (30, K.PREFILL),
        (10, K.PIPELINE_WAIT),
        (30, K.PREFILL),
        (10, K.OTHER),
    ]
    lost = [row for row in events if row[1] != E.RESUMED]
    assert K.PREEMPTED not in {cls for _, cls in life(request_ledger(records(lost, entries, INTERVALS)), "a")}


def test_open_requests_are_followed_to_the_end_of_what_is_known() -> None:
    events = [("q", E.ARRIVED, 400, -1), ("k", E.ARRIVED, 500, -1), ("k", E.KV_WAIT, 600, -1), ("t", E.TOKEN, 700, 3)]
    ledger = request_ledger(records(events, until=1000))
    assert ledger.ended.tolist() == [False, False, False]
    assert life(ledger, "q") == [(600, K.QUEUE)]
    assert life(ledger, "k") == [(100, K.QUEUE), (400, K.KV_WAIT)]
    assert life(ledger, "t") == [(300, K.OTHER)]
    lossy = request_ledger(records(events, until=1000, lossy=True))
    assert life(lossy, "q") == [(600, K.OTHER)], "rows are missing: perhaps it was scheduled"
    assert life(request_ledger(records([*events, ("q", E.FAILED, 450, -1)])), "q") == [(50, K.QUEUE)], "given up"


def test_prompts_of_others_are_charged_to_whoever_decodes() -> None:
    events = [(name, E.SCHEDULED, 0, 0) for name in "ab"]
    entries = [("a", step, 5 + step, 1, Phase.DECODE, step * 10 * MS) for step in range(12)]
    entries.append(("b", 11, 0, 60, Phase.PREFILL, 110 * MS))
    times = [3.0] * 11 + [8.0]
    intervals = [(0, s * 10 * MS, int((s * 10 + ms) * MS), C.COMPUTE, s, -1) for s, ms in enumerate(times)]
    everything = records(events, entries, intervals, until=200 * MS, num_ranks=1)
    ledger = request_ledger(everything)
    sums = dict(zip(ledger.names, ledger.sums().tolist(), strict=True))
    of = [CLASSES.index(cls) for cls in (K.DECODE, K.INTERFERENCE, K.PREFILL)]
    assert [sums["a"][place] / MS for place in of] == [36.0, 5.0, 0.0]
    assert [sums["b"][place] / MS for place in of] == [0.0, 0.0, 8.0]
    assert ledger.unsplit_ns == 0
    mixed = RequestTimes(everything).mixed_steps(0, 10**12)
    assert {name: column.tolist() for name, column in mixed.items()} == {
        "ns": [8.0 * MS],
        "typical_ns": [3.0 * MS],
        "decoding": [1],
        "prefill": [60],
    }
    gaps = RequestTimes(everything).token_gaps()
    assert (gaps["ns"][:10] / MS).tolist() == [10.0] * 10
    assert (gaps["ns"][10] / MS, gaps["mixed"].tolist()) == (15.0, [False] * 10 + [True])
    few = records(events, entries[9:], intervals[9:], until=200 * MS, num_ranks=1)
    assert (request_ledger(few).unsplit_ns, few.until_ns) == (8 * MS, 200 * MS), (
        "no decode-only step tells what it takes"
    )


def test_nothing_is_a_ledger_of_nobody() -> None:
    for empty in (records([], num_ranks=0), records([("warmup-1", E.ARRIVED, 0, -1)]), records_of_tables({})):
        ledger = request_ledger(empty)
        assert (len(ledger), ledger.sums().shape, ledger.waits()) == (0, (0, len(CLASSES)), {})


TIMES = st.integers(-5, 40)
NAMES = st.sampled_from(["a", "b", "warmup-0", None])


@given(
    events=st.lists(st.tuples(NAMES, st.integers(0, 12), TIMES, st.integers(-1, 4)), max_size=12),
    entries=st.lists(
        st.tuples(NAMES, st.integers(-1, 4), st.integers(-1, 3), st.integers(0, 3), st.integers(-1, 3), TIMES),
        max_size=8,
    ),
    intervals=st.lists(
        st.tuples(st.integers(-1, 3), TIMES, TIMES, st.integers(-1, 14), st.integers(-1, 4), st.integers(-1, 3)),
        max_size=14,
    ),
    until=TIMES,
    lossy=st.booleans(),
    window=st.one_of(st.none(), st.tuples(TIMES, st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))),
)
@settings(max_examples=400, deadline=None)
def test_whatever_is_recorded_lives_are_covered_once(
    events: list[Any],
    entries: list[Any],
    intervals: list[Any],
    until: int,
    lossy: bool,
    window: tuple[int, int] | None,
) -> None:
    ledger = request_ledger(records(events, entries, intervals, until=until, lossy=lossy), window)
    assert set(ledger.names) <= {row[0] for row in [*events, *entries] if row[0] in ("a", "b")}
    assert set(ledger.names) >= {row[0] for row in entries if row[0] in ("a", "b")}
    assert ledger.sums().sum(axis=1).tolist() == (ledger.end_ns - ledger.begin_ns).tolist()
    for at in range(len(ledger)):
        mine = ledger.spans["at"] == at
        begin, end = ledger.spans["begin"][mine], ledger.spans["end"][mine]
        assert (end > begin).all() and (begin[1:] == end[:-1]).all()
        assert not len(begin) or (begin[0], end[-1]) == (ledger.begin_ns[at], ledger.end_ns[at])
    waits = ledger.spans["cls"] == CLASSES.index(K.PIPELINE_WAIT)
    assert ((ledger.spans["rank"] >= 0) == waits).all(), "a wait names its rank, and nothing else does"


@pytest.fixture(scope="module")
def run() -> dict[str, pa.Table]:
    tables = simulate(
        Scenario(seed=3, seconds=3.0, requests_per_s=12.0, tail=0.2, faults=(Fault("kv_small", size=300),))
    )
    groups = Groups().sort(tables)
    group = latest(groups)
    assert group is not None
    return groups[group]


def classes_at(ledger: RequestLedger, name: str, moments: np.ndarray[Any, np.dtype[np.int64]]) -> list[RequestClass]:
    mine = ledger.spans["at"] == ledger.names.index(name)
    begin, cls = ledger.spans["begin"][mine], ledger.spans["cls"][mine]
    return [CLASSES[n] for n in cls[np.clip(np.searchsorted(begin, moments, side="right") - 1, 0, None)]]


def test_a_pipeline_leaves_little_unexplained(run: dict[str, pa.Table]) -> None:
    ledger = request_ledger(records_of_tables(run))
    sums = dict(zip(CLASSES, ledger.sums().sum(axis=0).tolist(), strict=True))
    assert len(ledger) > 20
    assert sums[K.OTHER] < 0.02 * sum(sums.values())
    assert min(sums[cls] for cls in (K.QUEUE, K.KV_WAIT, K.PREFILL, K.DECODE, K.INTERFERENCE, K.PIPELINE_WAIT)) > 0
    assert (1, str(LedgerClass.COMPUTE)) in ledger.waits()
    stretches = RequestTimes(records_of_tables(run))
    halves = [stretches.ledger(0, 9), stretches.ledger(9, len(stretches))]
    assert np.concatenate([half.sums() for half in halves]).tolist() == ledger.sums().tolist()


def test_evidence_and_tables_say_the_same(run: dict[str, pa.Table]) -> None:
    evidence = Evidence()
    evidence.add(run)
    here, there = request_ledger(records_of_evidence(evidence, 0)), request_ledger(records_of_tables(run))
    known = dict(zip(there.names, there.sums().tolist(), strict=True))
    assert dict(zip(here.names, here.sums().tolist(), strict=True)) == known


@given(
    seed=st.integers(0, 10_000), lost=st.sampled_from(["intervals", "steps"]), share=st.sampled_from([0.01, 0.1, 0.5])
)
@settings(max_examples=25, deadline=None)
def test_lost_rows_become_other_and_nothing_else(run: dict[str, pa.Table], seed: int, lost: str, share: float) -> None:
    random = np.random.default_rng(seed)
    kept = random.random(run[lost].num_rows) >= share
    whole = request_ledger(records_of_tables(run))
    partial = request_ledger(records_of_tables({**run, lost: run[lost].filter(pa.array(kept))}))
    for at, name in enumerate(whole.names):
        until = partial.end_ns[partial.names.index(name)]  # what is known of open requests ends with the last row
        moments = random.integers(whole.begin_ns[at], until, 200)
        for before, after in zip(classes_at(whole, name, moments), classes_at(partial, name, moments), strict=True):
            same = {before, after} <= {K.DECODE, K.INTERFERENCE}  # what is typical rests on the steps that are left
            assert after in (before, K.OTHER) or same, f"{name}: {before} became {after}"


def test_rows_of_requests_that_are_missing_are_noticed(run: dict[str, pa.Table]) -> None:
    assert not records_of_tables(run).lossy
    assert records_of_tables(
        {**run, "requests": run["requests"].filter(pa.array(np.arange(len(run["requests"])) != 5))}
    ).lossy
    assert not records_of_tables({**run, "requests": schema_of("requests").empty_table()}).lossy


def test_requests_of_another_replica_are_not_counted_here() -> None:
    found = Groups().sort(simulate(Scenario(seed=1, seconds=3.0, replicas=2)))
    ledgers = [request_ledger(records_of_tables(found[group])) for group in sorted(found)]
    assert len(ledgers) == 2
    ran = [{name for name, t in zip(found.names, found.first_token_ns, strict=True) if t >= 0} for found in ledgers]
    assert min(map(len, ran)) > 20
    assert len(ran[0] & ran[1]) < 6, "of the steps whose number only one of them reached the other knows nothing"
    for ledger in ledgers:
        sums = dict(zip(CLASSES, ledger.sums().sum(axis=0).tolist(), strict=True))
        assert sums[K.OTHER] < 0.05 * sum(sums.values())
