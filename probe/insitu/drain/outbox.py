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
from typing import Final, NamedTuple

import pyarrow as pa

from insitu import forks
from insitu.config import DEFAULT_QUEUE_BYTES
from insitu.exporters.base import Batch, Exporter, Refused, Retry
from insitu.records import TABLES, table_spec
from insitu.vocabulary import DropReason

logger = logging.getLogger("insitu")

BATCH_BYTES: Final = 1 << 20
"""Aim of one frame; larger batches are cut by rows."""
FOR_THE_DRAIN: Final = 4
"""One part in so many of the bound is left to rows that are in no batch yet."""
_FULL: Final = (DropReason.DISK_FULL, DropReason.SPOOL_FULL)


class _Unacknowledged(NamedTuple):
    num_rows: int
    num_bytes: int


@dataclass(slots=True)
class _Stream:
    next_seq: int = 0
    pending: dict[int, _Unacknowledged] = field(default_factory=dict)
    """By batch seq: exported but not known to be durable."""


class Outbox:
    """The bounded queue, and the counts of every table.

    `num_bytes` is what waits here: queued, and exported but not known to be durable. An exporter may hold the latter in
    memory, so that both share one bound.
    """

    def __init__(
        self,
        epoch: int,
        exporter: Exporter,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.durable: Counter[str] = Counter()
        self.dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.export_ns: Counter[str] = Counter()
        """CPU time of the thread that exports, by table."""
        self.max_bytes = queue_bytes
        self._most_bytes = queue_bytes - queue_bytes // FOR_THE_DRAIN
        self.num_bytes = 0
        self._epoch = epoch
        self._exporter = exporter
        self._partly_refused: Callable[[], list[tuple[int, int, DropReason]]]
        self._partly_refused = getattr(exporter, "partly_refused", list)
        self._clock = clock
        self._queue: deque[Batch] = deque()
        self._streams: defaultdict[str, _Stream] = defaultdict(_Stream)
        self._retry_at = 0.0
        self.blocked_by = DropReason.QUEUE_FULL
        self._is_abandoned = False
        self.keep: Callable[[str, pa.RecordBatch], None] | None = None
        """Is given what is queued, beside the exporter."""

    def drop(self, table: str, reason: DropReason, num_rows: int) -> None:
        """Count rows that were produced and will not be stored."""
        if num_rows:
            self.dropped[table][str(reason)] += num_rows

    def put(self, table: str, rows: pa.RecordBatch) -> None:
        """Queue a batch of one table, cut to about `BATCH_BYTES` a frame."""
        assert rows.schema.equals(table_spec(table).schema), f"a batch of {table} has another schema"
        for piece in _cut(rows):
            if not self._has_room(pa.ipc.get_record_batch_size(piece)):
                self.drop(table, self.blocked_by, piece.num_rows)
                continue
            stream = self._streams[table]
            batch = _own(Batch(self._epoch, stream.next_seq, piece, table))
            self._queue.append(batch)
            stream.next_seq += 1
            self.num_bytes += len(batch.body)
            if self.keep is not None:
                self.keep(table, batch.data)

    def _has_room(self, num_bytes: int) -> bool:
        if self.num_bytes + num_bytes > self._most_bytes:
            self.settle()  # what has become durable since the last look waits no more
        return not self._is_abandoned and self.num_bytes + num_bytes <= self._most_bytes

    def ship(self) -> None:
        """Hand over what the exporter takes now; never wait for it."""
        while self._queue and self._clock() >= self._retry_at:
            batch, began_ns = self._queue[0], time.thread_time_ns()
            refusal: Refused | None = None
            try:
                self._exporter.export(batch)
            except Retry as retry:
                self._retry_at = self._clock() + retry.after_s
                self.blocked_by = retry.reason
                break
            except Refused as refused:
                refusal = refused
            self.export_ns[batch.table] += time.thread_time_ns() - began_ns
            if self._is_abandoned:  # meanwhile, by a thread that could not wait for the exporter
                return
            self._queue.popleft()
            if refusal is not None:
                self.num_bytes -= len(batch.body)
                self._give_up(batch, refusal.reason)
            else:
                self._streams[batch.table].pending[batch.seq] = _Unacknowledged(batch.num_rows, len(batch.body))
                self.blocked_by = DropReason.QUEUE_FULL
        self.settle()

    def settle(self) -> None:
        """Move what is durable or was refused meanwhile out of pending."""
        for number, seq, reason in self._exporter.refused():
            table = TABLES[number]
            self.drop(table, reason, self._release(self._streams[table], seq))
        for number, num_rows, reason in self._partly_refused():  # out of batches that are durable
            self.durable[TABLES[number]] -= num_rows
            self.drop(TABLES[number], reason, num_rows)
        # Last: a batch that was refused holds those after it back until it is read.
        for table, stream in self._streams.items():
            if not stream.pending:
                continue
            durable = self._exporter.durable(table_spec(table).stream)
            for seq in [seq for seq in stream.pending if seq <= durable]:
                self.durable[table] += self._release(stream, seq)

    def _release(self, stream: _Stream, seq: int) -> int:
        """Let one exported batch go; return its rows."""
        num_rows, num_bytes = stream.pending.pop(seq, _Unacknowledged(0, 0))
        self.num_bytes -= num_bytes
        return num_rows

    def flush(self, timeout_s: float) -> None:
        """Ship and wait until everything is durable, at most `timeout_s`."""
        deadline = self._clock() + timeout_s
        self._retry_at = 0.0
        while True:
            with forks.turn:  # not while it waits: a fork has a collector's acknowledgements wait for a new connection
                self.ship()
            left = deadline - self._clock()
            if left <= 0 or not self.num_pending:
                return
            if self._exporter.flush(min(left, 0.2)) and not self._queue:
                self.settle()
                return
            if self._queue:
                time.sleep(min(left, max(0.0, min(0.05, self._retry_at - self._clock()))))

    def give_up_on_full_disk(self) -> int:
        """Give up what is queued where a disk has no room for it; return how many rows. Then few more may find some.

        None of it was taken, so what comes after has its numbers: no stream has a hole.
        """
        if self._is_abandoned or self.blocked_by not in _FULL:
            return 0
        given_up, self._queue = self._queue, deque()
        for batch in reversed(given_up):
            self._streams[batch.table].next_seq = batch.seq
            self.num_bytes -= len(batch.body)
            self.drop(batch.table, self.blocked_by, batch.num_rows)
        self._retry_at = 0.0
        return sum(batch.num_rows for batch in given_up)

    def close(self, timeout_s: float) -> int:
        """Let the exporter go within the deadline; return how many rows were then given up, by it or here."""
        before = self.num_dropped
        self._exporter.close(timeout_s)
        self.settle()
        self.abandon()
        return self.num_dropped - before

    def abandon(self) -> int:
        """Give up what is still queued or unacknowledged, and return how many rows: the process ends.

        Another thread than the drain's may call it once that one hangs in the exporter.
        """
        self._is_abandoned = True
        given_up = Counter({table: sum(p.num_rows for p in s.pending.values()) for table, s in self._streams.items()})
        for batch in list(self._queue):
            given_up[batch.table] += batch.num_rows
        blocked = self.blocked_by
        for table, num_rows in given_up.items():
            self.drop(table, DropReason.SHUTDOWN if blocked is DropReason.QUEUE_FULL else blocked, num_rows)
            self._streams[table].pending.clear()
        self._queue.clear()
        self.num_bytes = 0
        return given_up.total()

    def _give_up(self, batch: Batch, reason: DropReason) -> None:
        self.drop(batch.table, reason, batch.num_rows)
        if reason is not DropReason.PROBE_ERROR:  # whoever contained the error has said it
            logger.warning("insitu: %d rows of %s were refused (%s)", batch.num_rows, batch.table, reason)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Rows durable, pending and dropped so far."""
        return sum(self.durable.values()), self.num_pending, self.num_dropped

    @property
    def num_pending(self) -> int:
        """Rows queued or exported but not known to be durable."""
        unacknowledged = sum(p.num_rows for stream in self._streams.values() for p in stream.pending.values())
        return unacknowledged + sum(batch.num_rows for batch in self._queue)

    @property
    def fullness(self) -> float:
        """How full it is, from 0 to 1."""
        return self.num_bytes / self._most_bytes

    @property
    def room_bytes(self) -> int:
        """How much more may wait here."""
        return max(0, self._most_bytes - self.num_bytes)

    @property
    def num_dropped(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.dropped.values())


def _cut(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    pieces = min(max(1, -(-rows.nbytes // BATCH_BYTES)), max(1, rows.num_rows))
    step = -(-rows.num_rows // pieces) if rows.num_rows else 1
    yield from (rows.slice(at, step) for at in range(0, rows.num_rows, step))


def _own(batch: Batch) -> Batch:
    """Return the batch over memory of its own, its body: a slice would keep alive all that it was cut from."""
    own = Batch(batch.epoch, batch.seq, pa.ipc.read_record_batch(batch.body, batch.data.schema), batch.table)
    own.__dict__["body"] = batch.body  # the very bytes the columns lie in: not made again
    return own
