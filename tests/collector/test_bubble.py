"""The bubble: what a stage waited, what the pipeline's shape costs, how many micro-batches were in flight."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.ledger.bubble import bubbles, floor_of, mean_in_flight, to_lines
from insitu_collector.ledger.window import Ledger, LedgerRow

MS = 1_000_000


def work(
    step: int, mb: int | None, t0: int, t1: int, rank: int = 0, cls: int = IntervalClass.COMPUTE
) -> dict[str, Any]:
    row = {"epoch": rank + 1, "rank": rank, "stage": rank, "row_seq": t0, "cls": int(cls), "step_id": step, "mb": mb}
    return row | {"t0_ns": t0 * MS, "t1_ns": t1 * MS}


def in_flight(rows: list[dict[str, Any]], t0: int = 0, t1: int = 1000) -> float | None:
    table = pa.Table.from_pylist(rows, schema=schema_of("intervals"))
    return mean_in_flight(table, Timeline(), t0 * MS, t1 * MS)


def ledger(**seconds: dict[int, int]) -> Ledger:
    """A ledger of 100 ns, one rank a stage; what is not given is unrecorded."""
    rows = [LedgerRow(rank, rank, LedgerClass(cls), ns) for cls, by in seconds.items() for rank, ns in by.items()]
    for rank in {row.rank for row in rows}:
        rest = 100 - sum(row.ns for row in rows if row.rank == rank)
        rows += [LedgerRow(rank, rank, LedgerClass.UNRECORDED, rest)] if rest else []
    return Ledger(0, 100, tuple(rows), {row.rank: 0 for row in rows})


def test_the_floor_is_that_of_equal_stages() -> None:
    assert floor_of(1, 3) == 0.0
    assert floor_of(4, 1) == 0.75
    assert floor_of(2, 2) == pytest.approx(1 / 3)


@given(st.integers(1, 64), st.floats(1, 64))
def test_more_in_flight_costs_less(num_stages: int, in_flight: float) -> None:
    assert 0 <= floor_of(num_stages, in_flight + 1) <= floor_of(num_stages, in_flight) < 1


def test_the_share_is_of_time_with_work_and_the_excess_beyond_the_floor() -> None:
    found = bubbles(
        ledger(
            compute={0: 40, 1: 20},
            wait_downstream={0: 10},
            wait_upstream={1: 30},
            transfer={1: 10},
            no_demand={0: 50, 1: 20},
        ),
        2.0,
    )
    assert [each.share for each in found] == [0.2, 40 / 60]  # 20 of stage 1 are unrecorded
    assert [each.excess for each in found] == [pytest.approx(0.2 - 1 / 3), pytest.approx(2 / 3 - 1 / 3)]
    text = "\n".join(to_lines(found))
    assert "stage 1: 66.7%; 2 equal stages with 2.0 micro-batches in flight: 33.3%, so +33.3" in text


def test_what_is_not_on_record_is_not_guessed() -> None:
    found = bubbles(ledger(no_demand={0: 100}, compute={1: 100}), None)
    assert [(each.share, each.floor, each.excess) for each in found] == [(None, None, None), (0.0, None, None)]
    assert bubbles(Ledger(0, 0, (), {}), None) == ()
    assert to_lines(()) == []


def test_two_slots_that_take_turns_are_one_in_flight() -> None:
    turns = [work(n, n % 2, 10 * n, 10 * n + 10) for n in range(20)]
    assert in_flight(turns) == 1.0


def test_two_slots_that_overlap_are_counted_for_as_long_as_they_do() -> None:
    first = [work(0, 0, 0, 40), work(0, 0, 60, 100, rank=1)]
    second = [work(1, 1, 50, 90), work(1, 1, 100, 150, rank=1)]
    assert in_flight([*first, *second]) == pytest.approx((100 + 100) / 150)
    assert in_flight([*first, *second], 50, 100) == 2.0


def test_waits_warmup_of_nobody_and_rows_without_a_slot_do_not_fly() -> None:
    assert in_flight([]) is in_flight([work(0, 0, 0, 10)], 10, 20) is None
    assert in_flight([work(0, None, 0, 10), work(-1, 0, 0, 10), work(1, 0, 0, 10, cls=IntervalClass.RECV_WAIT)]) is None
