"""What an exporter is: the seam between the drain thread and wherever rows go."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import pyarrow as pa

from insitu.cached import cached
from insitu.records import TableSpec, table_spec
from insitu.vocabulary import DropReason


class Level(IntEnum):
    """How far a batch got. Numbers are those of the wire."""

    PENDING = 0
    """On its way; nothing is promised."""
    RECEIVED = 1
    """Checked and in the receiver's memory."""
    DURABLE = 2
    """On disk, synced: readable after a kill -9 and, where the disk keeps its word, after a power loss."""


@dataclass(frozen=True)
class Batch:
    """One sequenced record batch: rows `data` of one `table` of one `epoch`."""

    epoch: int
    seq: int
    """Counts batches of one (epoch, table) from 0 without gaps."""
    data: pa.RecordBatch
    table: str

    @cached
    def spec(self) -> TableSpec:
        """Its table's schema and numbers."""
        return table_spec(self.table)

    @property
    def stream(self) -> int:
        """The table's number on the wire."""
        return self.spec.stream

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return int(self.data.num_rows)

    @cached
    def body(self) -> bytes:
        """The batch as one Arrow IPC message: no schema, no compression."""
        return self.data.serialize().to_pybytes()  # type: ignore[no-any-return]

    @cached
    def crc32(self) -> int:
        """`zlib.crc32(body)`: the one checksum from probe to reader."""
        return zlib.crc32(self.body)


@dataclass(frozen=True, slots=True)
class Ack:
    """All batches of the stream up to and including `seq` reached `level`."""

    stream: int
    seq: int
    level: Level


class Retry(Exception):
    """The exporter cannot take the batch now. The caller keeps it, and gives it again after_s seconds later.

    reason: under which its rows are counted if the caller has to give them up meanwhile.
    """

    def __init__(self, after_s: float, reason: DropReason = DropReason.COLLECTOR_UNREACHABLE) -> None:
        super().__init__(f"try again in {after_s:g} s ({reason})")
        self.after_s = after_s
        self.reason = reason


class Refused(Exception):
    """The batch will never be taken. The caller counts it under reason and goes on; detail is for the log."""

    def __init__(self, reason: DropReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


class Exporter(Protocol):
    """Where batches go. Called by one thread only. `export` raises `Retry` or `Refused`, nothing else.

    One that can lose some rows of a batch has `partly_refused` too: it returns, once each, the (stream, rows, reason)
    of rows that were refused out of batches which are durable otherwise.
    """

    def export(self, batch: Batch) -> Ack:
        """Take one batch; return the level its stream is known to have reached for `batch.seq`."""
        ...

    def durable(self, stream: int) -> int:
        """Return the highest seq of the stream up to which everything is durable, or -1."""
        ...

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, the (stream, seq, reason) that were refused after `export` had returned."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything exported is durable; False when the time ran out first."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flush within the deadline and let go of every resource. Safe to call twice."""
        ...
