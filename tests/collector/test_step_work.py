"""When steps were worked on, what ranks did while they waited, and what a decode-only step takes."""

from __future__ import annotations

import numpy as np
import pytest

from insitu.vocabulary import IntervalClass, LedgerClass
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.work import LEDGER_CLASSES, NEAR_NS, StepWork, step_work, typical_ns

C = IntervalClass
STAGES = {0: 0, 1: 1}
Row = tuple[int, int, int, int, int, int]
"""(rank, t0, t1, class, step, peer)"""


def intervals(*rows: Row) -> Columns:
    return dict(zip(("rank", "t0", "t", "cls", "step", "peer"), np.array(rows, np.int64).reshape(-1, 6).T, strict=True))


TWO_STAGES = (
    (0, 0, 10, C.COMPUTE, 7, -1),
    (0, 10, 40, C.RECV_WAIT, 8, 1),
    (1, 0, 14, C.COMPUTE, 6, -1),
    (1, 14, 16, C.HOST, 7, -1),
    (1, 16, 25, C.COMPUTE, 7, -1),
    (1, 25, 30, C.SAMPLE, 7, -1),
    (1, 30, 40, C.RECV_WAIT, 8, 0),
)


def test_a_step_is_worked_on_by_any_rank_and_waits_in_between() -> None:
    found = step_work(intervals(*TWO_STAGES), STAGES)
    place = int(found.find(np.array([7]))[0])
    assert (found.begin[place], found.end[place], found.busy_ns[place]) == (0, 30, 24)
    assert (found.whole[place], found.first_rank[place]) == (True, 0)
    assert found.find(np.array([6, 9, -1])).tolist() == [0, -1, -1]
    assert not found.whole[0], "stage 0 has no forward pass of step 6"
    waits = {name: column[found.waits["at"] == place].tolist() for name, column in found.waits.items()}
    assert (waits["begin"], waits["end"], waits["rank"], waits["own"]) == ([10, 14], [14, 16], [1, 1], [0, 1])
    assert [LEDGER_CLASSES[cls] for cls in waits["cls"]] == [LedgerClass.COMPUTE, LedgerClass.HOST]


def test_where_a_rank_has_no_record_nobody_is_waited_for() -> None:
    rows = [row for row in TWO_STAGES if row[:2] != (0, 10)]
    found = step_work(intervals(*rows, (0, 10, 12, C.SEND_XFER, 7, 1)), STAGES)
    place = int(found.find(np.array([7]))[0])
    mine = found.waits["at"] == place
    assert (found.waits["begin"][mine].tolist(), found.waits["end"][mine].tolist()) == ([10], [12])


def test_no_intervals_no_steps() -> None:
    found = step_work(intervals(), {})
    assert (len(found.step), len(found.waits["at"]), found.find(np.array([3])).tolist()) == (0, 0, [-1])


def steps(times_ms: list[float], every_ms: float = 20.0) -> StepWork:
    rows = [
        (0, int(n * every_ms * 1e6), int((n * every_ms + ms) * 1e6), C.COMPUTE, n, -1) for n, ms in enumerate(times_ms)
    ]
    return step_work(intervals(*rows), {0: 0})


def test_a_typical_step_is_the_median_of_those_like_it_nearby() -> None:
    work = steps([4.0] * 20 + [9.0] + [4.0] * 20 + [8.0] * 20 + [9.0])
    decoding, prefill = np.full(62, 3), np.zeros(62, np.int64)
    prefill[[20, 61]] = 50
    found = typical_ns(work, decoding, prefill)
    assert found[[20, 61]].tolist() == [4e6, 8e6], "what a step takes drifts"
    assert np.isnan(np.delete(found, [20, 61])).all()
    decoding[20] = 9
    assert np.isnan(typical_ns(work, decoding, prefill)[20]), "no step of 9 to 16 decoding rows"


@pytest.mark.parametrize("every_ms", [NEAR_NS / 1e6, 20.0])
def test_too_few_decode_only_steps_nearby_say_nothing(every_ms: float) -> None:
    work = steps([4.0] * 4 + [9.0], every_ms)
    prefill = np.array([0, 0, 0, 0, 50])
    assert np.isnan(typical_ns(work, np.full(5, 2), prefill)).all()
