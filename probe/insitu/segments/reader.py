"""Reading a segment while it is written, after it is sealed, or after its writer died. Torch-free."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import TableSpec, table_spec
from insitu.segments import disk
from insitu.segments.footer import Block
from insitu.segments.layout import OPEN, SEALED, Key, SegmentName, list_segments
from insitu.segments.message import (
    CONTINUATION,
    END_MARK,
    MAGIC,
    RECORD_BATCH,
    SCHEMA,
    Head,
    NotAMessage,
    head_bytes,
    hides_a_batch,
    read_head,
)
from insitu.segments.stored import checked_batch, compatible_schema, is_known, newer_format

FIRST_MESSAGE: Final = 8
"""Where the stream begins: after the magic and its padding."""
PIECE_BYTES: Final = 4 << 20
"""What is in memory at a time of a file that is read in pieces."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of a segment that could not be read."""

    segment: SegmentName
    offset: int
    num_bytes: int
    torn: bool
    """The file just ends too early; otherwise its bytes changed after they were written."""
    epoch: int | None = None
    seq: int | None = None
    num_rows: int | None = None
    """Of the one batch that was lost; None when not even its head can be read."""


_BROKEN: Final = (ValueError, OSError, pa.ArrowException)
"""What pyarrow and we raise over bytes that are no batch."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A batch, its bytes, and where they lie in the file."""

    batch: Batch
    message: memoryview
    block: Block


class TailReader:
    """Reads the batches of one segment, each once, in stored order, as far as they have been written.

    Holds the file open, so sealing, renaming or unlinking it meanwhile changes nothing. Every batch is validated
    and its checksum compared before it is returned. Rows have the columns of today's schema: columns a newer
    version added are left out, columns an older one lacked are null. Raises FileNotFoundError when there is no
    such segment, open or sealed.
    """

    def __init__(self, store: Path, segment: SegmentName, state: str | None = None) -> None:
        self.segment = segment
        self.spec: TableSpec = table_spec(segment.table)
        self.damage: list[Damage] = []
        self.finished = False
        """The footer was reached, or a final read came to the end of the file."""
        self.newer = ""
        """The format version, where it is one that cannot be read here: nothing is returned, and nothing damaged."""
        self.schema_message = b""
        """The file's own schema, as it is stored; empty while it has not been read, or where it does not fit."""
        self._fd = _open_either(store, segment) if state is None else _open(segment.path(store, state))
        self._position = FIRST_MESSAGE
        self._schema: pa.Schema = self.spec.schema

    @property
    def good_bytes(self) -> int:
        """Where the next batch is expected."""
        return self._position

    @property
    def written_ns(self) -> int:
        """When the file was last written, Unix time."""
        return disk.fstat(self._fd).st_mtime_ns

    def read(self, *, final: bool = False, max_bytes: int | None = None) -> list[Batch]:
        """Return the batches that are new since the last call.

        `final`: nobody writes this file any more, so what is incomplete is lost and goes to `damage`. max_bytes: read
        about so much at a time, or one batch where that is larger; call again until nothing comes.
        """
        return [placed.batch for placed in self._placed(final, max_bytes)]

    def read_pieces(self) -> Iterator[Placed]:
        """Yield what a final read returns, with its place, and only a piece of the file in memory at a time."""
        while not self.finished:
            yield from self._placed(final=True, max_bytes=PIECE_BYTES)

    def _placed(self, final: bool, max_bytes: int | None) -> list[Placed]:
        size = disk.fstat(self._fd).st_size
        end = size if max_bytes is None else min(size, self._position + max_bytes)
        while True:
            found = self._read(end, final=final and end == size)
            if found or self.finished or end == size:
                return found
            end = min(size, end + (end - self._position) + (max_bytes or 0))

    def _read(self, end: int, *, final: bool) -> list[Placed]:
        view = memoryview(self._bytes_to(end))
        found: list[Placed] = []
        at = 0
        while not self.finished:
            batch, next_at = self._advance(view, at, final)
            if batch is not None:
                block = Block(self._position + at, head_bytes(view, at), next_at - at)
                found.append(Placed(batch, view[at:next_at], block))
            elif next_at == at:
                break
            at = next_at
        self._position += at
        return found

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        if self._fd >= 0:
            disk.close(self._fd)
            self._fd = -1

    def _bytes_to(self, end: int) -> bytes:
        """Return the bytes from where the next batch is expected to `end`; fewer where the file ends."""
        parts: list[bytes] = []
        at = self._position
        while at < end and (part := disk.pread(self._fd, end - at, at)):
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _advance(self, data: memoryview, at: int, final: bool) -> tuple[Batch | None, int]:
        """Return the batch at `at`, if there is one, and where to go on; the same place when there is no more now."""
        try:
            head, broken = read_head(data, at), False
            if head is not None and head.is_end and is_footer(data, at + head.num_bytes):
                self.finished = True
                return None, at + head.num_bytes
            if head is not None and not head.is_end and at + head.num_bytes <= len(data):
                return self._take(data, at, head), at + head.num_bytes
        except _BROKEN:
            head, broken = None, True
        if not broken and not final:
            return None, at
        return None, self._skip(data, at, broken, final)

    def _skip(self, data: memoryview, at: int, broken: bool, final: bool) -> int:
        """Return where to go on behind what cannot be read: at the next batch whose checksum is right."""
        found = self._next_good(data, at + 1)
        if found is not None:
            self._damaged(data, at, found, torn=False)
            return found
        if final:
            self.finished = True
            if at < len(data) and bytes(data[at:]) != END_MARK:
                self._damaged(data, at, len(data), torn=not broken)
        return at

    def _next_good(self, data: memoryview, start: int) -> int | None:
        """Return the place of the next whole, right batch (or of the footer) at or after `start`."""
        raw = data.obj
        assert isinstance(raw, bytes), "the view is over the bytes just read"
        place = raw.find(CONTINUATION, start)
        while place >= 0:
            if (self._position + place) % 8 == 0 and self._is_good(data, place):
                return place
            place = raw.find(CONTINUATION, place + 1)
        return None

    def _is_good(self, data: memoryview, at: int) -> bool:
        try:
            head = read_head(data, at)
            if head is None or at + head.num_bytes > len(data):
                return False
            if head.is_end:
                return is_footer(data, at + head.num_bytes)
            return self._take(data, at, head) is not None
        except _BROKEN:
            return False

    def _take(self, data: memoryview, at: int, head: Head) -> Batch | None:
        message = pa.py_buffer(data[at : at + head.num_bytes])
        if head.kind == SCHEMA and self._position + at == FIRST_MESSAGE:
            schema = pa.ipc.read_schema(message)
            self.newer = newer_format(schema)
            self.finished = bool(self.newer)
            self._schema = compatible_schema(schema, self.spec)
            self.schema_message = message.to_pybytes() if is_known(schema, self.spec.name) else b""
            return None
        if head.kind != RECORD_BATCH:
            raise NotAMessage(f"a message of kind {head.kind}")
        try:
            return checked_batch(message, head, self._schema, self.spec)
        except _BROKEN:
            if self._schema.equals(self.spec.schema):
                raise
            batch = checked_batch(message, head, self.spec.schema, self.spec)  # the stored schema may be what broke
            self._schema, self.schema_message = self.spec.schema, b""
            return batch

    def _damaged(self, data: memoryview, at: int, end: int, *, torn: bool) -> None:
        epoch, seq, num_rows = _identity_of_lost(data, at, end)
        offset = self._position + at
        self.damage.append(Damage(self.segment, offset, end - at, torn, epoch, seq, num_rows))


def _identity_of_lost(data: memoryview, at: int, end: int) -> tuple[int | None, int | None, int | None]:
    """Return epoch, seq and rows of the one batch in a lost stretch, as far as its head can be read."""
    try:
        head = read_head(data, at)
        if head is not None and head.is_end and end == len(data) and not hides_a_batch(data, at):
            return None, None, 0  # a footer cut short
        if head is None or head.kind != RECORD_BATCH:
            return None, None, None
        behind = at + head.num_bytes
        if behind != end and not behind > end == len(data):
            return None, None, None
        metadata = dict(head.metadata)
        return int(metadata["epoch"]), int(metadata["seq"]), head.num_rows
    except (KeyError, ValueError):
        return None, None, None


def is_footer(data: memoryview, at: int) -> bool:
    """Return whether a whole footer, and nothing else, lies from `at` to the end."""
    tail_bytes = 4 + len(MAGIC)
    if len(data) - at < tail_bytes or bytes(data[-len(MAGIC) :]) != MAGIC:
        return False
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - tail_bytes)
    return bool(at + footer_bytes + tail_bytes == len(data))


def _open(path: Path) -> int:
    return disk.open(path, os.O_RDONLY)


def _open_either(store: Path, segment: SegmentName) -> int:
    """Open a segment that may be sealed between our look and our call."""
    try:
        return _open(segment.path(store, OPEN))
    except FileNotFoundError:
        return _open(segment.path(store, SEALED))


def key_of(batch: Batch) -> Key:
    """Return which batch it is."""
    return Key(batch.epoch, batch.stream, batch.seq)


def recent_keys(store: Path, shard: str, max_bytes: int = 256 << 20) -> Iterator[Key]:
    """Yield which batches the newest sealed segments of a shard hold, `max_bytes` of them; only heads are read."""
    paths = [(name.number, name.path(store, SEALED)) for name in list_segments(store, SEALED) if name.shard == shard]
    # By time, not by number: what took the place of old segments has a high one.
    newest = sorted(((disk.stat(path).st_mtime_ns, number, path) for number, path in paths), reverse=True)
    for _, _, path in newest:
        yield from (key for key, _ in batch_heads(path))
        max_bytes -= disk.stat(path).st_size
        if max_bytes <= 0:
            return


def batch_heads(path: Path) -> list[tuple[Key, Head]]:
    """Return which batches a sealed segment holds; a damaged one tells as much as it can."""
    found: list[tuple[Key, Head]] = []
    if disk.stat(path).st_size <= FIRST_MESSAGE:
        return found
    with disk.mapped(path) as data:
        at = FIRST_MESSAGE
        with contextlib.suppress(KeyError, ValueError):
            while (head := read_head(data, at)) and not head.is_end:
                if head.kind == RECORD_BATCH:
                    pairs = dict(head.metadata)
                    found.append((Key(int(pairs["epoch"]), int(pairs["stream"]), int(pairs["seq"])), head))
                at += head.num_bytes
    return found
