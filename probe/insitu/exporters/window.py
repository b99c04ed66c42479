"""Frames that were sent, or wait to be, and are not known to be durable. Pure; the caller holds the lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from insitu.exporters.base import Batch, Level
from insitu.vocabulary import DropReason
from insitu.wire.insitu_pb2 import Frame


@dataclass(frozen=True, slots=True)
class Pending:
    """One batch in the window, as little of it as sending needs."""

    stream: int
    seq: int
    schema: int
    num_rows: int
    crc32: int
    body: bytes

    @classmethod
    def of(cls, batch: Batch) -> Pending:
        return cls(batch.stream, batch.seq, batch.spec.digest, batch.num_rows, batch.crc32, batch.body)

    def frame(self) -> Frame:
        """Return the message to send."""
        return Frame(
            stream=self.stream,
            seq=self.seq,
            schema=self.schema,
            num_rows=self.num_rows,
            crc32=self.crc32,
            body=self.body,
        )


class Window:
    """Unacknowledged frames in order, and how far each stream came."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_acks = 0
        self._frames: dict[int, deque[Pending]] = {}
        """By stream, in order of seq."""
        self._order: dict[tuple[int, int], Pending] = {}
        """All of them, in the order they were exported."""
        self._durable: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._unreported: list[tuple[int, int, DropReason]] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, pending: Pending) -> None:
        """Take a frame. Streams come in order of seq."""
        self._order[pending.stream, pending.seq] = pending
        self._frames.setdefault(pending.stream, deque()).append(pending)
        self.num_bytes += len(pending.body)

    def in_order(self) -> list[Pending]:
        """Return all frames in the order they were exported: what a new connection sends first."""
        return list(self._order.values())

    def acknowledge(self, stream: int, seq: int, level: Level) -> None:
        """Everything of the stream up to `seq` reached `level`."""
        self.num_acks += 1
        self._received[stream] = max(seq, self._received.get(stream, -1))
        if level < Level.DURABLE:
            return
        frames = self._frames.get(stream, deque())
        while frames and frames[0].seq <= seq:
            self._durable[stream] = frames[0].seq
            self._remove(frames.popleft())

    def refuse(self, stream: int, seq: int, reason: DropReason) -> bool:
        """Give up one frame for good; return False when it is not in the window."""
        pending = self._order.get((stream, seq))
        if pending is None:
            return False
        self._frames[stream].remove(pending)
        self._remove(pending)
        self._unreported.append((stream, seq, reason))
        return True

    def take_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, what was given up."""
        refused, self._unreported = self._unreported, []
        return refused

    def durable(self, stream: int) -> int:
        """Return the highest seq that is durable with all before it; -1 at first. Unreported refusals hold it back."""
        highest = self._durable.get(stream, -1)
        return min([highest, *(seq - 1 for number, seq, _ in self._unreported if number == stream)])

    def level(self, stream: int, seq: int) -> Level:
        """Return how far one frame is known to have come."""
        if seq <= self.durable(stream):
            return Level.DURABLE
        return Level.RECEIVED if seq <= self._received.get(stream, -1) else Level.PENDING

    @property
    def is_settled(self) -> bool:
        """Whether everything is durable and every refusal was reported."""
        return not self._order and not self._unreported

    def _remove(self, pending: Pending) -> None:
        del self._order[pending.stream, pending.seq]
        self.num_bytes -= len(pending.body)
