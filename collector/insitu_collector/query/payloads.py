"""The bytes of captured rows: views of a sealed segment's memory map where they lie in one piece, copies otherwise.

A map is private: what is written into a tensor stays in this process. It outlives the file's name, and nothing ever
cuts a segment, so a view stays good when its segment expires.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.exporters.base import Batch
from insitu.segments.erasure import Erased
from insitu.segments.layout import SEALED, SegmentName
from insitu_collector.query.scan import Scan
from insitu_collector.query.segment import Opened, Segment

Bytes = NDArray[np.uint8]
TABLE: Final = "captures"
MOST_HELD: Final = 256
"""Batches that are kept checked; each is a few objects beside its segment's map."""
_BROKEN: Final = (ValueError, OSError, pa.ArrowException)


class RowGone(LookupError):
    """A captured row that is not in the store, or no longer; the text is one line for the user."""


@dataclass(frozen=True, slots=True)
class Held:
    """One checked batch, and the map it lies in; None: it was copied."""

    rows: pa.RecordBatch
    memory: Bytes | None
    begin: int
    """Where the batch's payload begins in `memory`."""
    epoch: int
    numbers: NDArray[np.int64]
    """`row_seq` of each row."""
    erased: frozenset[int] = frozenset()
    """Those of rows that are not to be shown."""

    def may_have(self, epoch: int, row_seq: int) -> bool:
        """Return whether a row is likely to be of this batch."""
        return self.epoch == epoch and bool(self.numbers[0] <= row_seq <= self.numbers[-1])

    def place_of(self, row_seq: int) -> int | None:
        """Return which row of the batch has this number; None where none has that may be shown."""
        if row_seq in self.erased:
            return None
        found = np.flatnonzero(self.numbers == row_seq)
        return int(found[0]) if len(found) else None

    def stretch(self, place: int) -> tuple[int, int]:
        """Return where the payload of a row begins and ends within that of the batch."""
        column = self.rows["data"]
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :]
        return int(offsets[place]), int(offsets[place + 1])

    def payload(self, start: int, end: int) -> Bytes:
        """Return a stretch of the payload: of the map itself where there is one."""
        if self.memory is not None:
            return self.memory[self.begin + start : self.begin + end]
        data: Bytes = np.frombuffer(self.rows["data"].buffers()[2], np.uint8)[start:end].copy()
        return data


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the payload of one row lies."""

    held: Held
    start: int
    end: int

    def read(self) -> Bytes:
        """Return its bytes."""
        return self.held.payload(self.start, self.end)


class Payloads:
    """Finds the payload of rows by (epoch, row_seq). Not for several threads at once."""

    def __init__(self, store: Path, scan: Scan) -> None:
        self._store = store
        self._scan = scan
        self._held: OrderedDict[tuple[SegmentName, int], Held] = OrderedDict()
        self._maps: dict[SegmentName, Bytes] = {}
        self._erased = Erased()

    def pieces(self, rows: Sequence[tuple[int, int]]) -> list[Piece]:
        """Return where the payload of each row, by (epoch, row_seq), lies. Raises RowGone."""
        return [self._piece(epoch, row_seq) for epoch, row_seq in rows]

    def row(self, epoch: int, row_seq: int) -> tuple[dict[str, Any], Piece]:
        """Return a row without its payload, and where that lies. Raises RowGone."""
        piece = self._piece(epoch, row_seq)
        place = piece.held.place_of(row_seq)
        assert place is not None, "the piece is of this row"
        rows = piece.held.rows
        return {name: rows[name][place].as_py() for name in rows.schema.names if name != "data"}, piece

    def _piece(self, epoch: int, row_seq: int) -> Piece:
        self._hide()
        for held in self._holding(epoch, row_seq):
            place = held.place_of(row_seq)
            if place is not None and held.epoch == epoch:
                return Piece(held, *held.stretch(place))
        raise RowGone(f"no captured row {row_seq} of epoch {epoch}; it was never stored, or has expired")

    def _hide(self) -> None:
        """Let go of what was read before more was erased. Raises ErasedUnreadable."""
        erased = self._scan.erased.read()
        if erased.erasures != self._erased.erasures:
            self._held.clear()
            self._maps.clear()
        self._erased = erased

    def _holding(self, epoch: int, row_seq: int) -> Iterator[Held]:
        """Yield batches that may hold a row: those read already first, then what the store has."""
        yield from [held for held in reversed(self._held.values()) if held.may_have(epoch, row_seq)]
        for segment, place in self._scan.segment_of(TABLE, epoch, row_seq):
            try:
                yield self._hold(segment, place)
            except FileNotFoundError:
                continue
            except _BROKEN:
                segment.is_damaged = True
        for batch in self._scan.batches(TABLE, lambda extents: ~extents.all()):
            yield held_of(batch.data, batch.epoch)  # out of damaged segments

    def _hold(self, segment: Segment, place: int) -> Held:
        key = segment.name, place
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = self._checked(segment, place)
            if len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
                self._maps = {name: self._maps[name] for name, _ in self._held if name in self._maps}
        self._held.move_to_end(key)
        return held

    def _checked(self, segment: Segment, place: int) -> Held:
        memory = self._map(segment)
        if memory is None:
            return self._shown(self._copied(segment, place), None, 0)
        offset, num_bytes = int(segment.extents.offset[place]), int(segment.extents.num_bytes[place])
        batch = segment.checked(memory[offset : offset + num_bytes].data)
        payload = batch.data["data"].buffers()[2]
        begin = 0 if payload is None else payload.address - memory.ctypes.data
        is_inside = payload is not None and offset <= begin <= offset + num_bytes - payload.size
        return self._shown(batch, memory if is_inside else None, begin)

    def _shown(self, batch: Batch, memory: Bytes | None, begin: int) -> Held:
        numbers = np.asarray(batch.data["row_seq"])
        left = self._erased.left(TABLE, batch.epoch, batch.data)
        erased = frozenset() if left is batch.data else frozenset(numbers.tolist()) - set(left["row_seq"].to_pylist())
        return Held(batch.data, memory, begin, batch.epoch, numbers, erased)

    def _copied(self, segment: Segment, place: int) -> Batch:
        file = Opened(self._store, segment.name)
        try:
            return segment.batch(file, place)
        finally:
            file.close()

    def _map(self, segment: Segment) -> Bytes | None:
        """Return a sealed segment's bytes, mapped; None while it is being written."""
        if segment.name not in self._maps:
            try:
                with segment.name.path(self._store, SEALED).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError:
                return None
            self._maps[segment.name] = np.frombuffer(mapped, np.uint8)
        return self._maps[segment.name]


def held_of(rows: pa.RecordBatch, epoch: int) -> Held:
    """Return rows of one process that lie in memory of their own."""
    return Held(rows, None, 0, epoch, np.asarray(rows["row_seq"]))


def joined(pieces: Sequence[Piece]) -> tuple[Bytes, bool]:
    """Return the bytes of rows one after the other, and whether they are a view: where they lie so in one map."""
    first = pieces[0]
    follows = all(a.held is b.held and a.end == b.start for a, b in pairwise(pieces))
    if follows and first.held.memory is not None:
        return first.held.payload(first.start, pieces[-1].end), True
    return np.concatenate([piece.read() for piece in pieces]), False
