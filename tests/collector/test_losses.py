"""Losses: between which heartbeats rows were dropped, and what the store misses."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from insitu.records import schema_of
from insitu.segments.gaps import sent_again_row, standing
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.export.losses import Loss, drops_of, gaps_of
from insitu_collector.views.row_counts import missing_rows


def beat(epoch: int, t_ns: int, *drops: tuple[str, str, int]) -> dict[str, Any]:
    lost = [{"table": table, "reason": reason, "rows": rows} for table, reason, rows in drops]
    return {"epoch": epoch, "rank": epoch - 1, "stage": 0, "row_seq": t_ns, "t_ns": t_ns, "dropped": lost or None}


def found(*beats: dict[str, Any]) -> list[Loss]:
    return drops_of(pa.Table.from_pylist(list(beats), schema=schema_of("health")), Timeline())


def test_a_loss_lies_between_the_heartbeats_that_differ() -> None:
    losses = found(
        beat(1, 10),
        beat(2, 11),
        beat(2, 31, ("intervals", "ring_full", 2)),
        beat(1, 20, ("intervals", "ring_full", 5)),
        beat(1, 30, ("intervals", "ring_full", 5)),
        beat(1, 40, ("intervals", "ring_full", 8), ("steps", "queue_full", 1)),
    )
    assert losses == [
        Loss(0, 10, 20, 5, "rows lost: 5 of intervals (ring_full)"),
        Loss(1, 11, 31, 2, "rows lost: 2 of intervals (ring_full)"),
        Loss(0, 30, 40, 4, "rows lost: 3 of intervals (ring_full), 1 of steps (queue_full)"),
    ]


def test_what_the_first_heartbeat_counts_was_lost_before_it() -> None:
    assert found(beat(1, 10, ("steps", "queue_full", 1))) == [Loss(0, 10, 10, 1, "rows lost: 1 of steps (queue_full)")]
    restarted = found(beat(1, 10, ("steps", "queue_full", 8)), beat(2, 50, ("steps", "queue_full", 3)))
    assert [loss.num_rows for loss in restarted] == [8, 3], "each process counts from nothing"
    assert found(beat(1, 10), beat(1, 20)) == []
    assert found() == []


def test_gaps_of_these_sources_are_told_and_what_expired_is_not() -> None:
    gap = {"epoch": 9, "rank": -1, "stage": -1, "row_seq": 0, "table": "steps", "unix_ns": 1_050, "num_rows": 3}
    rows = [gap | {"source_epoch": 1, "reason": "torn_tail"}, gap | {"source_epoch": 2, "reason": "torn_tail"}]
    rows.append(gap | {"source_epoch": 1, "reason": "expired"})
    sources = [{"epoch": 1, "rank": 4, "stage": 0, "row_seq": 0, "role": "rank"}]
    gaps = pa.Table.from_pylist(rows, schema=schema_of("gaps"))
    told = gaps_of(gaps, pa.Table.from_pylist(sources, schema=schema_of("sources")), 1_000)
    assert told == [Loss(4, 50, 50, 3, "rows lost in the store: 3 of steps (torn_tail)")]


def test_a_loss_that_was_taken_back_is_none() -> None:
    gap = {"epoch": 9, "rank": -1, "stage": -1, "row_seq": 0, "table": "steps", "unix_ns": 1_050, "num_rows": 3}
    gap |= {"source_epoch": 1, "reason": "torn_tail", "num_bytes": 9, "file": "steps/collector-0000000001.arrow"}
    told = [gap | {"seq_from": seq, "seq_to": seq} for seq in (4, 5)]
    back = gap | sent_again_row(told[0], 1_060)
    unread = gap | {"seq_from": None, "seq_to": None, "num_rows": None}
    assert standing([*told, back]) == [told[1]]
    assert standing([*told, back, told[0]]) == [told[1], told[0]], "it was lost once more"
    assert standing([unread, *told, unread]) == [unread, *told, unread]
    gaps = pa.Table.from_pylist([*told, back], schema=schema_of("gaps"))
    sources = pa.Table.from_pylist(
        [{"epoch": 1, "rank": 4, "stage": 0, "row_seq": 0, "role": "rank"}], schema=schema_of("sources")
    )
    assert [loss.num_rows for loss in gaps_of(gaps, sources, 1_000)] == [3]
    assert missing_rows({}, gaps) == {"torn_tail": 3}
