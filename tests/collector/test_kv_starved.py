"""Verdict `kv_starved`: told where requests wait for memory, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from insitu.vocabulary import RequestEvent, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.judge.judgement import Judgement
from insitu_collector.requests.records import RequestRecords
from insitu_collector.requests.times import request_ledger
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts import kv_starved
from insitu_collector.verdicts.finding import Finding, Verdict, standing

E = RequestEvent
S = 1_000_000_000
WINDOW = (100 * S, 110 * S)


def judged(tables: dict[str, pa.Table]) -> list[Verdict]:
    judgement = Judgement("run")
    parts = list(seconds(tables))
    return [verdict for n, part in enumerate(parts) for verdict in judgement.look(part, final=n == len(parts) - 1)]


def look(*events: tuple[Any, ...], pool: tuple[int, int] | None = (32, 16), already: bool = False) -> list[Finding]:
    """events: (request, event, seconds into the window, tokens)."""
    evidence = Evidence(kv_pool=pool)
    columns: dict[str, Any] = {
        "request": np.array([row[0] for row in events], object),
        "event": np.array([row[1] for row in events], np.int64),
        "t": np.array([WINDOW[0] + int(row[2] * S) for row in events], np.int64),
        "step": np.full(len(events), -1),
    }
    evidence.requests.add(**columns, tokens=np.array([row[3] for row in events], np.int64))
    nothing = {name: np.zeros(0, np.int64) for name in ("rank", "t0", "t", "cls", "step", "peer")}
    entries = {name: np.zeros(0, np.int64) for name in ("step", "position", "count", "phase", "t")}
    records = RequestRecords(columns, {**entries, "request": np.zeros(0, object)}, nothing, {0: 0}, WINDOW[1])
    assert kv_starved.is_possible(evidence)
    return kv_starved.look(evidence, request_ledger(records, WINDOW), WINDOW, already=already)


def starved(num: int, seconds_each: float = 9.0) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for n in range(num):
        rows += [(f"r{n}", E.ARRIVED, 0.5, 40), (f"r{n}", E.KV_WAIT, 1.0, 40)]
        rows += [(f"r{n}", E.SCHEDULED, 1.0 + seconds_each, -1)]
    return rows


def test_the_text_says_how_many_for_how_long_and_what_would_have_held_them() -> None:
    (found,) = look(*starved(4))
    assert found.text == (
        "requests waited for key/value memory: 4 of 4 did, for 95 % of all requests' time in 10 s (36.0 s together); "
        "at most 4 at once, which needed 12 blocks beside the 32 that there are."
    )
    assert "1.4 times the `--kv-mib`" in found.remedy
    assert (found.requests, found.confidence) == (("r0", "r1", "r2", "r3"), 0.9)
    assert (found.on_rank, found.on_stage) == (None, None)


def test_what_is_not_known_is_not_said() -> None:
    (found,) = look(*starved(4), pool=None)
    assert "blocks" not in found.text and "times the" not in found.remedy
    unsized = [(name, event, t, -1) for name, event, t, _ in starved(4)]
    assert "blocks" not in look(*unsized)[0].text


def test_few_or_short_waits_are_not_told() -> None:
    assert look(*starved(kv_starved.MIN_REQUESTS - 1)) == []
    assert look(*starved(4, 1.5)) == []
    assert len(look(*starved(4, 1.5), already=True)) == 1, "once told it stands longer"


def test_preemption_is_said() -> None:
    rows: list[tuple[Any, ...]] = []
    for n in range(3):
        rows += [(f"r{n}", E.ARRIVED, 0, 40), (f"r{n}", E.SCHEDULED, 1, -1), (f"r{n}", E.PREEMPTED, 2, -1)]
        rows += [(f"r{n}", E.RESUMED, 8, -1)]
    assert "or were preempted for it: 3 of 3 did" in look(*rows)[0].text


def test_a_pipeline_with_memory_for_two_requests_is_starved() -> None:
    found = judged(simulate(Scenario(seed=1, seconds=8.0, faults=(Fault("kv_small", size=160),))))
    assert VerdictKind.KV_STARVED in {verdict.kind for verdict in standing(found)}
    assert {verdict.kind for verdict in standing(found)} <= {VerdictKind.KV_STARVED, VerdictKind.PREFILL_DELAYS_DECODE}
    assert VerdictKind.HEALTHY in {verdict.kind for verdict in found}, "stages are judged as ever"


def test_slots_that_lack_memory_to_be_filled_are_starved_and_not_underfilled() -> None:
    """Two of three are in use, ranks wait for half the time, and a replay that knows of no memory would fill the third.

    Who waits is counted behind the one that lacks memory, and now and then nobody does for a moment.
    """
    run = Scenario(
        seed=180,
        seconds=13.0,
        base_ms=(5.6398, 6.0998, 5.2548),
        in_flight=3,
        requests_per_s=17.764,
        noise=0.0945,
        tail=0.0328,
    )
    found = judged(simulate(replace(run, faults=(Fault("kv_small", size=252),))))
    kinds = {verdict.kind for verdict in standing(found)}
    assert VerdictKind.KV_STARVED in kinds and VerdictKind.PIPELINE_UNDERFILLED not in kinds


@pytest.mark.parametrize("seed", range(4))
def test_a_full_batch_is_not_starved(seed: int) -> None:
    found = judged(simulate(Scenario(seed=seed, seconds=8.0, requests_per_s=25.0)))
    assert VerdictKind.KV_STARVED not in {verdict.kind for verdict in found}
