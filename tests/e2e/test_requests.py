"""A real server without enough memory, and one whose long prompts hold up others: requests say what they waited for.

Part of `make soak`: CI runs a trial of each of these kinds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_system import running

from insitu.vocabulary import RequestClass, RequestEvent, VerdictKind
from insitu_collector.judge.runs import final_verdicts
from insitu_collector.store import open_store
from insitu_collector.views.stalls import stalls_of

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(120)]

SERVE = ["-m", "insitu", "serve", "--stages", "2"]
TRAFFIC_S = 8.0
"""Longer than the shortest window that is judged, however fast the machine."""
LONG = " ".join(["the morning train left the harbour late and everybody on it knew why"] * 14)


def together(jobs: list[Callable[[], None]]) -> None:
    """Let each job be done again and again, by a client of its own, for `TRAFFIC_S`."""
    end_s = time.monotonic() + TRAFFIC_S

    def client(job: Callable[[], None]) -> None:
        while time.monotonic() < end_s:
            job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for ended in [pool.submit(client, job) for job in jobs]:
            ended.result()


def test_requests_that_wait_for_memory_are_told_with_what_would_hold_them(tmp_path: Path) -> None:
    with running(tmp_path, [*SERVE, "--kv-mib", "1"]) as system:  # 21 blocks, of which each request takes 3

        def client() -> None:
            system.complete("Once there was a brave farmer", max_tokens=40, temperature=0)

        together([client] * 20)
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
            system.complete("Tom", max_tokens=100, temperature=0)

        def prefill() -> None:
            system.complete(LONG, max_tokens=2, temperature=0)

        together([decode, decode, decode, prefill, prefill])
    told = {verdict.kind: verdict for verdict in final_verdicts(open_store(system.store))}
    assert "one that only decodes" in told[VerdictKind.PREFILL_DELAYS_DECODE].text
    assert "`--token-budget" in told[VerdictKind.PREFILL_DELAYS_DECODE].remedy
