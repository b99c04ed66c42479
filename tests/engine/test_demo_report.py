"""The demo's document: the golden file holds its shape; each figure comes from whom it should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import DropReason
from insitu_engine.demo_report import (
    NO_FAULT,
    Reports,
    Setting,
    document,
    faults_done,
    ledger_rows,
    ready_to_verdict_s,
    records,
    render,
    verdict_key,
)

GOLDEN = Path(__file__).parents[1] / "golden/demo.json"
READY = 1_700_000_000_000_000_000
SECOND = 1_000_000_000

SLOW = {
    "kind": "stage_limits",
    "stage": 1,
    "rank": 1,
    "layer": None,
    "site": None,
    "step": None,
    "phase": None,
    "confidence": 0.97,
    "text": "stage 1 limits the pipeline: rank 1 takes 34.1 ms a micro-batch, 25.2 ms more than its healthy 8.9 ms",
    "remedy": "look at what keeps rank 1 from computing; without it throughput would be 2.9x",
    "window_unix_ns": [READY + 5 * SECOND, READY + 30 * SECOND],
    "detected_unix_ns": READY + 9 * SECOND,
    "num_requests": 2,
    "requests": ["req-41", "req-42"],
}


def source(role: str, rank: int, produced: dict[str, int], dropped: dict[str, dict[str, int]], share: float) -> Any:
    return {"role": role, "rank": rank, "produced": produced, "dropped": dropped, "overhead_share": share}


REPORTS = Reports(
    load={"completed": 118, "failed": 1, "tokens_per_s": 98.25},
    sources=[
        source("driver", -1, {"sources": 1, "requests": 900, "health": 36}, {}, 0.0),
        source("rank", 0, {"sources": 1, "steps": 1800, "intervals": 9000}, {}, 0.0031),
        source("rank", 1, {"sources": 1, "steps": 1800, "intervals": 9100}, {"intervals": {"ring_full": 100}}, 0.0042),
    ],
    stalls={
        "verdicts": [{**SLOW, "state": "open"}],
        "revised": 0,
        "ledger_window_unix_ns": [READY, READY + 30 * SECOND],
        "ledger": [
            {"stage": 0, "rank": 0, "class": "compute", "seconds": 8.5, "on_rank": None},
            {"stage": 0, "rank": 0, "class": "wait_downstream", "seconds": 20.0, "on_rank": 1},
            {"stage": 0, "rank": 0, "class": "wait_downstream", "seconds": 1.5, "on_rank": -1},
            {"stage": 1, "rank": 1, "class": "compute", "seconds": 30.0, "on_rank": None},
        ],
        "records": {"stored": {"sources": 3, "requests": 900, "health": 36, "steps": 3600, "intervals": 18000}},
    },
    faults=[
        {"event": "began", "kind": "slow_stage", "stage": 1, "rank": 1, "layer": None, "step": None, "ms": 25.0}
        | {"unix_ns": READY + 5 * SECOND, "end_unix_ns": None}
    ],
)
SETTING = Setting(
    seed=0,
    model="tiny-llama",
    num_stages=2,
    device="cpu",
    store="insitu-store/demo-20260101-120000",
    start_to_ready_s=6.125,
    ready_unix_ns=READY,
    first_seen_unix_ns={verdict_key("stage_limits", 1, 1, READY + 9 * SECOND): READY + 9_400_000_000},
)


def test_the_document_is_the_golden_one() -> None:
    assert document(SETTING, REPORTS) == json.loads(GOLDEN.read_text())


def test_what_was_produced_was_stored_or_dropped() -> None:
    kept = document(SETTING, REPORTS)["records"]
    assert kept["produced"] == kept["stored"] + sum(kept["dropped"].values())
    for table, counts in kept["tables"].items():
        assert counts["produced"] == counts["stored"] + counts["dropped"], table


counts = st.dictionaries(st.sampled_from(["steps", "intervals", "health"]), st.integers(0, 10**9))
reasons = st.dictionaries(st.sampled_from([str(reason) for reason in DropReason]), st.integers(0, 10**6))
drops = st.dictionaries(st.sampled_from(["steps", "intervals"]), reasons)


@given(st.lists(st.tuples(counts, drops), max_size=4), counts)
def test_records_add_up_whatever_was_reported(
    accounts: list[tuple[dict[str, int], dict[str, dict[str, int]]]], stored: Mapping[str, int]
) -> None:
    kept = records([source("rank", 0, *account, 0.0) for account in accounts], stored)
    assert kept["produced"] == sum(row["produced"] for row in kept["tables"].values())
    assert kept["stored"] == sum(row["stored"] for row in kept["tables"].values())
    assert sum(kept["dropped"].values()) == sum(row["dropped"] for row in kept["tables"].values())


def test_rows_that_expired_are_part_of_the_account() -> None:
    account = source("rank", 0, {"steps": 30, "intervals": 50}, {"intervals": {"ring_full": 5}}, 0.0)
    stalls = {
        **REPORTS.stalls,
        "records": {"stored": {"steps": 10, "intervals": 45}, "expired": {"steps": 20}, "erased": {}},
    }
    answer = document(SETTING, Reports(load=REPORTS.load, sources=[account], stalls=stalls, faults=[]))
    kept = answer["records"]
    assert kept["produced"] == kept["stored"] + sum(kept["dropped"].values()) + kept["expired"] == 80
    assert kept["tables"]["steps"] == {"produced": 30, "stored": 10, "dropped": 0, "expired": 20}
    assert "55 stored, 5 dropped (ring_full 5), 20 expired; the probe" in render(answer).replace("\n", "")


def test_without_a_fault_the_document_says_none() -> None:
    quiet = Reports(load=REPORTS.load, sources=REPORTS.sources, stalls=REPORTS.stalls, faults=[])
    answer = document(SETTING, quiet)
    assert answer["fault"] == NO_FAULT
    assert set(answer["fault"]) == set(json.loads(GOLDEN.read_text())["fault"])


def test_a_fault_is_told_once_however_often_it_is_logged() -> None:
    began = dict(REPORTS.faults[0])
    later = {**began, "stage": 0, "rank": 0, "unix_ns": began["unix_ns"] + 10 * SECOND}
    ended = {**began, "event": "ended", "end_unix_ns": began["unix_ns"] + 5 * SECOND}
    done = faults_done([later, began, ended])
    assert [(fault["stage"], fault["end_unix_ns"]) for fault in done] == [(1, ended["end_unix_ns"]), (0, None)]
    both = Reports(load=REPORTS.load, sources=[], stalls=REPORTS.stalls, faults=[later, began, ended])
    answer = document(SETTING, both)
    assert answer["fault"]["stage"] == 1
    assert [fault["stage"] for fault in answer["faults"]] == [1, 0]


def test_a_run_without_traffic_has_a_whole_document() -> None:
    empty = {"verdicts": [], "revised": 0, "ledger_window_unix_ns": None, "ledger": [], "records": {"stored": {}}}
    answer = document(SETTING, Reports(load=REPORTS.load, sources=[], stalls=empty, faults=[]))
    assert set(answer) == set(json.loads(GOLDEN.read_text()))
    assert answer["ready_to_verdict_s"] is None
    assert "too little traffic" in render(answer)


def test_time_to_the_verdict_is_when_it_could_be_read() -> None:
    assert ready_to_verdict_s(SETTING, [SLOW]) == pytest.approx(9.4)
    unseen = {**SLOW, "detected_unix_ns": READY + 12 * SECOND}
    assert ready_to_verdict_s(SETTING, [unseen]) == pytest.approx(12.0)
    healthy = {**SLOW, "kind": "healthy", "stage": None, "rank": None, "detected_unix_ns": READY + 6 * SECOND}
    assert ready_to_verdict_s(SETTING, [SLOW, healthy]) == pytest.approx(9.4)
    assert ready_to_verdict_s(SETTING, [healthy]) == pytest.approx(6.0)


def test_the_ledger_keeps_every_second() -> None:
    rows = ledger_rows(REPORTS.stalls["ledger"])
    assert len({(row["rank"], row["class"]) for row in rows}) == len(rows)
    assert sum(row["seconds"] for row in rows if row["rank"] == 0) == pytest.approx(30.0)


def test_the_words_hold_what_a_reader_needs() -> None:
    text = render(document(SETTING, REPORTS))
    assert "stage 1 limits the pipeline" in text
    assert "2 touched: req-41, req-42" in text
    assert "look at what keeps rank 1 from computing" in text
    assert "(confidence 0.97)" in text
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "dropped (ring_full 100)" in text
    assert "next      insitu stalls insitu-store/demo-20260101-120000" in text
    assert "next      .venv/bin/insitu stalls " in render(document(SETTING, REPORTS), ".venv/bin/insitu")
    ledger = [line.split() for line in text.splitlines() if line.startswith("  wait_downstream")]
    assert ledger == [["wait_downstream", "21.50", "s", "72", "%", "0.00", "s", "0", "%"]]
