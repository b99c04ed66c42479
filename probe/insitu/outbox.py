"""Between the drain and the exporter: rows become sequenced batches, wait in a bounded queue, and are counted.

Every row produced ends in exactly one of: durable, pending, dropped under one reason. Used by one thread (the
drain); other threads read only the counters.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Batch, Exporter, Refused, Retry
from insitu.records import TABLES, table_spec
from insitu.vocabulary import DropReason

logger = logging.getLogger("insitu")

BATCH_BYTES: Final = 1 << 20
"""Aim of one frame; larger batches are cut by rows."""
QUEUE_BYTES: Final = 64 << 20
"""Most bytes that wait for the exporter. Beyond it the newest rows are dropped and counted."""


@dataclass(slots=True)
class _Stream:
    next_seq: int = 0
    pending: dict[int, int] = field(default_factory=dict)
    """Batch seq -> rows, exported but not known to be durable."""


class Outbox:
    """The bounded queue, and the counts of every table."""

    def __init__(
        self,
        epoch: int,
        exporter: Exporter,
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.durable: Counter[str] = Counter()
        self.dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.export_ns: Counter[str] = Counter()
        """CPU time of the thread that exports, by table."""
        self._epoch = epoch
        self._exporter = exporter
        self._partly_refused: Callable[[], list[tuple[int, int, DropReason]]]
        self._partly_refused = getattr(exporter, "partly_refused", list)
        self._queue_bytes = queue_bytes
        self._clock = clock
        self._queue: deque[Batch] = deque()
        self._queued_bytes = 0
        self._streams: defaultdict[str, _Stream] = defaultdict(_Stream)
        self._retry_at = 0.0
        self._blocked_by = DropReason.QUEUE_FULL

    def drop(self, table: str, reason: DropReason, num_rows: int) -> None:
        """Count rows that were produced and will not be stored."""
        if num_rows:
            self.dropped[table][str(reason)] += num_rows

    def put(self, table: str, rows: pa.RecordBatch) -> None:
        """Queue a batch of one table, cut to about `BATCH_BYTES` a frame."""
        assert rows.schema.equals(table_spec(table).schema), f"a batch of {table} has another schema"
        for piece in _cut(rows):
            size = piece.nbytes
            if self._queued_bytes + size > self._queue_bytes:
                self.drop(table, self._blocked_by, piece.num_rows)
                continue
            stream = self._streams[table]
            self._queue.append(Batch(self._epoch, stream.next_seq, piece, table))
            stream.next_seq += 1
            self._queued_bytes += size

    def ship(self) -> None:
        """Hand over what the exporter takes now; never wait for it."""
        while self._queue and self._clock() >= self._retry_at:
            batch, began_ns = self._queue[0], time.thread_time_ns()
            try:
                self._exporter.export(batch)
            except Retry as retry:
                self._retry_at = self._clock() + retry.after_s
                self._blocked_by = retry.reason
                break
            except Refused as refused:
                self._give_up(batch, refused.reason)
            else:
                self._streams[batch.table].pending[batch.seq] = batch.num_rows
                self._blocked_by = DropReason.QUEUE_FULL
            self.export_ns[batch.table] += time.thread_time_ns() - began_ns
            self._queue.popleft()
            self._queued_bytes -= batch.data.nbytes
        self.settle()

    def settle(self) -> None:
        """Move what is durable or was refused meanwhile out of pending."""
        for number, seq, reason in self._exporter.refused():
            table = TABLES[number]
            self.drop(table, reason, self._streams[table].pending.pop(seq, 0))
        for number, num_rows, reason in self._partly_refused():  # out of batches that are durable
            self.durable[TABLES[number]] -= num_rows
            self.drop(TABLES[number], reason, num_rows)
        # Last: a batch that was refused holds those after it back until it is read.
        for table, stream in self._streams.items():
            durable = self._exporter.durable(table_spec(table).stream)
            for seq in [seq for seq in stream.pending if seq <= durable]:
                self.durable[table] += stream.pending.pop(seq)

    def flush(self, timeout_s: float) -> None:
        """Ship and wait until everything is durable, at most `timeout_s`."""
        deadline = self._clock() + timeout_s
        self._retry_at = 0.0
        while True:
            self.ship()
            left = deadline - self._clock()
            if left <= 0 or not self.num_pending:
                return
            if self._exporter.flush(min(left, 0.2)) and not self._queue:
                self.settle()
                return
            if self._queue:
                time.sleep(min(left, max(0.0, min(0.05, self._retry_at - self._clock()))))

    def abandon(self) -> None:
        """Give up what is still queued or unacknowledged: the process ends."""
        for batch in self._queue:
            self.drop(batch.table, self._reason_at_end(), batch.num_rows)
        for table, stream in self._streams.items():
            self.drop(table, self._reason_at_end(), sum(stream.pending.values()))
            stream.pending.clear()
        self._queue.clear()
        self._queued_bytes = 0

    def _reason_at_end(self) -> DropReason:
        blocked = self._blocked_by
        return DropReason.SHUTDOWN if blocked is DropReason.QUEUE_FULL else blocked

    def _give_up(self, batch: Batch, reason: DropReason) -> None:
        self.drop(batch.table, reason, batch.num_rows)
        logger.warning("insitu: %d rows of %s were refused (%s)", batch.num_rows, batch.table, reason)

    @property
    def num_pending(self) -> int:
        """Rows queued or exported but not known to be durable."""
        unacknowledged = sum(sum(stream.pending.values()) for stream in self._streams.values())
        return unacknowledged + sum(batch.num_rows for batch in self._queue)

    @property
    def room_bytes(self) -> int:
        """How much more may wait for the exporter."""
        return self._queue_bytes - self._queued_bytes

    @property
    def num_dropped(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.dropped.values())


def _cut(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    pieces = min(max(1, -(-rows.nbytes // BATCH_BYTES)), max(1, rows.num_rows))
    step = -(-rows.num_rows // pieces) if rows.num_rows else 1
    yield from (rows.slice(at, step) for at in range(0, rows.num_rows, step))
