"""Row 23 of the failure matrix: clocks that jump by an hour change neither the order of rows nor what is kept.

How skew between hosts is recorded and judged is for test_timeline.py, test_leaps.py and test_broken_records.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch
from insitu.exporters.window import Pending
from insitu.records import schema_of, table_spec
from insitu.segments.expiry import SWEEP_S, Expiry
from insitu.segments.retention import Busy, Keep
from insitu.segments.shard import Limits, ShardWriter, list_segments
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.store import open_store

EPOCH = 7
HOUR_NS = 3600 * 10**9
NOW_NS = 1_700_000_000 * 10**9


def event(seq: int, t_ns: int) -> Batch:
    row = {"epoch": EPOCH, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": t_ns, "kind": "incident"}
    return Batch(EPOCH, seq, pa.RecordBatch.from_pylist([row], schema=schema_of("events")), "events")


@pytest.mark.parametrize("jump_ns", [-HOUR_NS, HOUR_NS, -(10**9), 10**9])
def test_row_23_rows_are_in_order_of_seq_whatever_their_clock_did(jump_ns: int, tmp_path: Path) -> None:
    """An hour ahead, an hour back, and a leap second that comes twice."""
    times = [NOW_NS + seq + (jump_ns if seq >= 5 else 0) for seq in range(10)]
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    for seq in (0, 1, 3, 2, *range(4, 10)):  # even where frames overtook each other
        ingest.take(EPOCH, Pending.of(event(seq, times[seq])).frame())
    ingest.commit()
    assert ingest.reached(EPOCH, table_spec("events").stream) == (9, 9)
    ingest.close()
    rows = sorted(open_store(tmp_path).table("events").to_pylist(), key=lambda row: int(row["row_seq"]))
    assert [row["t_ns"] for row in rows] == times


def written(store: Path, ages_s: list[float], t_ns: int) -> None:
    """Write a segment for each age: when its file was last written; its rows say `t_ns`."""
    writer = ShardWriter(store, "a", limits=Limits(max_bytes=1))
    for seq in range(len(ages_s)):
        writer.append(event(seq, t_ns))
        writer.sync()
    writer.close()
    for name, age_s in zip(list_segments(store, "sealed"), ages_s, strict=True):
        at_ns = NOW_NS - round(age_s * 1e9)
        os.utime(name.path(store, "sealed"), ns=(at_ns, at_ns))


def left_after(store: Path, now_ns: int) -> list[int]:
    """Return the numbers of the segments that two looks at this time leave, of a shard that keeps two hours."""
    now_s = 0.0
    keep = Keep(max_bytes=None, max_age_s=7200.0)
    expiry = Expiry(store, "a", keep, lambda rows: None, own_epoch=1, clock=lambda: now_s, unix_clock_ns=lambda: now_ns)
    for _ in range(2):
        now_s += SWEEP_S
        expiry.look(Busy)
    return [name.number for name in list_segments(store, "sealed")]


@pytest.mark.parametrize("jump_ns", [-HOUR_NS, 0, HOUR_NS])
def test_row_23_what_is_kept_goes_by_when_it_was_received_not_by_what_rows_say(jump_ns: int, tmp_path: Path) -> None:
    written(tmp_path, [9000.0, 5400.0, 60.0, 0.0], t_ns=NOW_NS + jump_ns)
    assert left_after(tmp_path, NOW_NS) == [1, 2, 3]


@pytest.mark.parametrize(("jump_ns", "left"), [(-HOUR_NS, [0, 1, 2, 3]), (HOUR_NS, [2, 3])])
def test_row_23_a_jump_of_the_collectors_clock_moves_what_is_kept_by_as_much(
    jump_ns: int, left: list[int], tmp_path: Path
) -> None:
    written(tmp_path, [9000.0, 5400.0, 60.0, 0.0], t_ns=NOW_NS)
    assert left_after(tmp_path, NOW_NS + jump_ns) == left
