"""What a collector counts, and how."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.exporters import Batch
from insitu.records import schema_of
from insitu.segments.layout import Key
from insitu.segments.shard import Synced
from insitu.vocabulary import DropReason, FrameDefect, HangUp
from insitu_collector.health.counts import MOST_EPOCHS, Counts, Taken
from insitu_collector.health.histogram import Histogram

SECOND = 1_000_000_000


class Clock:
    now_ns = 100 * SECOND

    def __call__(self) -> int:
        return self.now_ns


def batch(table: str, *rows: dict[str, Any], epoch: int = 7, seq: int = 0) -> Batch:
    full = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": number, **row} for number, row in enumerate(rows)]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(full, schema=schema_of(table)), table)


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0.001, 90), min_size=1, unique=True).map(sorted))
def test_a_histogram_counts_each_value_once(values: list[float], bounds: list[float]) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    read = histogram.read()
    assert read.cumulative() == [
        *((str(bound), sum(value <= bound for value in values)) for bound in bounds),
        ("+Inf", len(values)),
    ]
    assert read.total == pytest.approx(sum(values))


def test_what_was_stored_is_counted_by_tenant_and_table() -> None:
    counts, one = Counts(Clock()), batch("events", {"t_ns": 0}, {"t_ns": 1})
    counts.took("a", one, has_our_clock=False)
    counts.took("a", one, has_our_clock=False)
    counts.took("b", one, has_our_clock=False)
    counts.took("b", None, has_our_clock=False)
    totals = counts.totals()
    assert totals.taken == {
        ("a", "events"): Taken(2, 4, 2 * len(one.body)),
        ("b", "events"): Taken(1, 2, len(one.body)),
    }
    assert totals.num_repeated == 1


def test_refusals_and_ended_streams_are_counted_by_reason() -> None:
    counts = Counts()
    counts.refused(DropReason.REFUSED_INVALID, 3, 10, FrameDefect.CHECKSUM)
    counts.refused(DropReason.REFUSED_QUOTA, 5, 20)
    counts.hung_up(HangUp.IDLE)
    totals = counts.totals()
    assert totals.refused == {("refused_invalid", "checksum"): Taken(1, 3, 10), ("refused_quota", ""): Taken(1, 5, 20)}
    assert totals.hung_up == {"idle": 1}


def test_the_time_from_the_newest_row_to_durable_is_of_processes_that_share_our_clock() -> None:
    clock = Clock()
    counts = Counts(clock)
    rows = [{"t0_ns": clock.now_ns - 9 * SECOND, "t1_ns": clock.now_ns - age * SECOND} for age in (3, 1)]
    counts.took("", batch("intervals", *rows), has_our_clock=True)
    counts.took("", batch("intervals", *rows, seq=1), has_our_clock=False)
    counts.took("", batch("summaries", {"step_id": 1}, seq=2), has_our_clock=True)
    counts.took("", batch("intervals", *rows, seq=3), has_our_clock=True)
    clock.now_ns += SECOND // 2
    keys = [Key(7, batch("intervals").stream, seq) for seq in range(4)]
    counts.committed(Synced(durable=keys[:3], failed=keys[3:]), 0.02)
    totals = counts.totals()
    assert (sum(totals.latency.counts), totals.latency.total) == (1, 1.5)
    assert (sum(totals.commits.counts), totals.num_sync_failures) == (1, 1)


def test_an_empty_commit_is_none() -> None:
    counts = Counts()
    counts.committed(Synced(), 0.02)
    assert sum(counts.totals().commits.counts) == 0


def dropping(epoch: int, *entries: tuple[str, int], seq: int = 0) -> Batch:
    told = [{"table": "steps", "reason": reason, "rows": rows} for reason, rows in entries]
    return batch("health", {"dropped": [{"table": "x", "reason": "queue_full", "rows": 1}]}, {"dropped": told},
                 epoch=epoch, seq=seq)  # fmt: skip


def test_drops_are_what_each_probe_said_last_and_their_sum_never_falls() -> None:
    counts = Counts()
    counts.took("", dropping(1, ("queue_full", 5)), has_our_clock=False)
    counts.took("", dropping(1, ("queue_full", 8), ("disk_full", 1), seq=1), has_our_clock=False)
    counts.took("", dropping(2, ("queue_full", 2), ("made up", 4)), has_our_clock=False)
    assert counts.totals().dropped == {"queue_full": 10, "disk_full": 1, "other": 4}
    for epoch in range(3, MOST_EPOCHS + 10):
        counts.took("", dropping(epoch), has_our_clock=False)
    assert counts.totals().dropped == {"queue_full": 10, "disk_full": 1, "other": 4}


def test_gaps_are_counted_whoever_tells_of_them() -> None:
    counts = Counts()
    counts.told_gaps([{"reason": "torn_tail", "num_rows": 3}, {"reason": "torn_tail", "num_rows": None}])
    counts.took("", batch("gaps", {"reason": "expired_unsent", "num_rows": 2}), has_our_clock=False)
    assert counts.totals().gaps == {"torn_tail": 3, "expired_unsent": 2}
