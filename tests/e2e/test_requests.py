"""A real server without enough memory, and one whose long prompts hold up others: requests say what they waited for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from live_system import running

from insitu.vocabulary import RequestClass, RequestEvent, VerdictKind
from insitu_collector.judge import final_verdicts
from insitu_collector.stalls import stalls_of
from insitu_collector.store import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SERVE = ["-m", "insitu", "serve", "--stages", "2"]
LONG = " ".join(["the morning train left the harbour late and everybody on it knew why"] * 14)


def together(jobs: list[threading.Thread]) -> None:
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()


def test_requests_that_wait_for_memory_are_told_with_what_would_hold_them(tmp_path: Path) -> None:
    with running(tmp_path, [*SERVE, "--kv-mib", "1"]) as system:  # 21 blocks, of which each request takes 3

        def client() -> None:
            system.complete("Once there was a brave farmer", max_tokens=40, temperature=0)

        together([threading.Thread(target=client) for _ in range(20)])
    store = open_store(system.store)
    told = {verdict.kind: verdict for verdict in final_verdicts(store)}
    assert "beside the 21 that there are" in told[VerdictKind.KV_STARVED].text
    assert "times the `--kv-mib`" in told[VerdictKind.KV_STARVED].remedy
    assert RequestEvent.KV_WAIT in store.table("requests")["event"].to_pylist()
    found = stalls_of(store)
    assert found is not None and found.requests is not None
    ns = found.requests.ns
    assert ns[RequestClass.KV_WAIT] > 0.2 * sum(ns.values())
    assert ns[RequestClass.OTHER] < 0.05 * sum(ns.values())


def test_long_prompts_in_one_step_are_told_to_delay_decoding(tmp_path: Path) -> None:
    with running(tmp_path, [*SERVE, "--token-budget", "512"]) as system:

        def decode() -> None:
            for _ in range(2):
                system.complete("Tom", max_tokens=100, temperature=0)

        def prefill() -> None:
            for _ in range(10):
                system.complete(LONG, max_tokens=2, temperature=0)

        together([threading.Thread(target=job) for job in (decode, decode, decode, prefill, prefill)])
    told = {verdict.kind: verdict for verdict in final_verdicts(open_store(system.store))}
    assert "one that only decodes" in told[VerdictKind.PREFILL_DELAYS_DECODE].text
    assert "`--token-budget" in told[VerdictKind.PREFILL_DELAYS_DECODE].remedy
