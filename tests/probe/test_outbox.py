"""Every row ends durable, pending, or dropped under one reason, whatever the exporter does."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.drain import builders
from insitu.drain.outbox import Outbox
from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.identity import Source
from insitu.vocabulary import DropReason

SOURCE = Source(epoch=7, run="0" * 16)


class Scripted:
    """An exporter that answers from a script of "ok", "later", "no"; durable only when told."""

    def __init__(self, script: list[str]) -> None:
        self.script = deque(script)
        self.taken: list[Batch] = []
        self.durable_seq = -1
        self.late: list[tuple[int, int, DropReason]] = []

    def export(self, batch: Batch) -> Ack:
        answer = self.script.popleft() if self.script else "ok"
        if answer == "later":
            raise Retry(1.0)
        if answer == "no":
            raise Refused(DropReason.REFUSED_INVALID)
        self.taken.append(batch)
        return Ack(batch.stream, batch.seq, Level.PENDING)

    def durable(self, stream: int) -> int:
        return self.durable_seq

    def refused(self) -> list[tuple[int, int, DropReason]]:
        late, self.late = self.late, []
        return late

    def flush(self, timeout_s: float) -> bool:
        self.durable_seq = max((batch.seq for batch in self.taken), default=-1)
        return True

    def close(self, timeout_s: float) -> None:
        return None


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def put(outbox: Outbox, first: int, num_rows: int) -> None:
    rows = np.zeros((num_rows, 9), np.int64)
    outbox.put("intervals", builders.intervals(SOURCE, range(first, first + num_rows), rows))


def test_retry_keeps_the_batch_until_its_time() -> None:
    clock, exporter = Clock(), Scripted(["later", "ok"])
    outbox = Outbox(7, exporter, clock=clock)
    put(outbox, 0, 3)
    outbox.ship()
    outbox.ship()
    assert exporter.taken == [], "not asked again before its time"
    clock.now += 1.0
    outbox.ship()
    assert [batch.num_rows for batch in exporter.taken] == [3]
    assert outbox.num_pending == 3


def test_a_full_queue_drops_the_newest_under_the_reason_that_blocks() -> None:
    rows = builders.intervals(SOURCE, range(10), np.zeros((10, 9), np.int64))
    num_bytes = len(Batch(7, 0, rows, "intervals").body)
    exporter = Scripted(["later"] * 9)
    outbox = Outbox(7, exporter, queue_bytes=3 * num_bytes, clock=Clock())
    put(outbox, 0, 10)
    outbox.ship()
    put(outbox, 10, 10)
    put(outbox, 20, 10)
    assert outbox.dropped["intervals"] == {"collector_unreachable": 10}
    assert outbox.num_pending == 20


def test_a_refusal_after_the_fact_is_counted_once() -> None:
    exporter = Scripted([])
    outbox = Outbox(7, exporter, clock=Clock())
    put(outbox, 0, 4)
    outbox.ship()
    exporter.late = [(exporter.taken[0].stream, 0, DropReason.DISK_FULL)]
    outbox.settle()
    outbox.settle()
    assert outbox.dropped["intervals"] == {"disk_full": 4}
    assert outbox.num_pending == 0


def test_what_is_left_at_the_end_is_counted_as_shutdown() -> None:
    exporter = Scripted([])
    outbox = Outbox(7, exporter, clock=Clock())
    put(outbox, 0, 4)
    outbox.ship()
    outbox.abandon()
    assert outbox.dropped["intervals"] == {"shutdown": 4}


def test_large_batches_are_cut_into_frames() -> None:
    exporter = Scripted([])
    outbox = Outbox(7, exporter, clock=Clock())
    put(outbox, 0, 40_000)
    outbox.ship()
    assert len(exporter.taken) > 1
    assert max(len(batch.body) for batch in exporter.taken) < 2 << 20
    assert [batch.seq for batch in exporter.taken] == list(range(len(exporter.taken)))


def test_a_batch_of_another_schema_is_a_bug() -> None:
    outbox = Outbox(7, Scripted([]), clock=Clock())
    with pytest.raises(AssertionError, match="another schema"):
        outbox.put("steps", builders.intervals(SOURCE, range(0), np.zeros((0, 9), np.int64)))


@given(
    st.lists(st.sampled_from(["ok", "later", "no"]), max_size=20),
    st.lists(st.integers(1, 40), max_size=12),
    st.integers(500, 20_000),
)
def test_no_row_is_lost_uncounted(script: list[str], sizes: list[int], queue_bytes: int) -> None:
    clock, exporter = Clock(), Scripted(script)
    outbox = Outbox(7, exporter, queue_bytes=queue_bytes, clock=clock)
    first = 0
    for size in sizes:
        put(outbox, first, size)
        first += size
        outbox.ship()
        clock.now += 0.6
        produced = sum(outbox.durable.values()) + outbox.num_pending + outbox.num_dropped
        assert produced == first
        assert outbox.num_bytes <= queue_bytes
    exporter.flush(0)
    outbox.settle()
    outbox.abandon()
    assert sum(outbox.durable.values()) + outbox.num_dropped == first
    assert outbox.num_pending == 0
