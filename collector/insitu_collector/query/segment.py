"""One segment for whoever asks: what its batches hold, found as far as it is written, and batches by their place.

All is read by `pread` of what is needed, and counted. Of a table with a payload column what a batch holds is found
without reading the payload. A batch whose rows are given out with its payload has had its checksum compared.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.exporters.base import Batch
from insitu.records import table_spec, with_todays_columns
from insitu.segments.layout import OPEN, SEALED, SegmentName
from insitu.segments.message import (
    MAX_METADATA_BYTES,
    PREFIX_BYTES,
    RECORD_BATCH,
    SCHEMA,
    Head,
    NotAMessage,
    buffer_places,
    read_head,
)
from insitu.segments.reader import FIRST_MESSAGE, is_footer
from insitu.segments.stored import BadBatch, checked_batch, compatible_schema, newer_format, newer_text
from insitu_collector.query.extents import Extents

PAYLOAD: Final = {"captures": "data", "spans": "otlp", "metrics": "otlp", "logs": "otlp"}
"""Table -> its one large column; whoever asks for rows need not read it."""
_BROKEN: Final = (ValueError, KeyError, OSError, pa.ArrowException)
_LOOK_BYTES: Final = 16 << 10
"""Read at once where a batch with a payload begins: its head, and most of what stands before the payload."""
_CHUNK_BYTES: Final = 4 << 20
"""Read at once of a table without one."""


class Opened:
    """A segment's file, held open: sealing, renaming or unlinking it meanwhile changes nothing."""

    def __init__(self, store: Path, segment: SegmentName) -> None:
        """Raises FileNotFoundError where it is neither open nor sealed."""
        self.bytes_read = 0
        self.is_sealed = False
        try:
            self.fd = os.open(segment.path(store, OPEN), os.O_RDONLY)
        except FileNotFoundError:
            self.fd = os.open(segment.path(store, SEALED), os.O_RDONLY)
            self.is_sealed = True
        self.size = os.fstat(self.fd).st_size

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return so many bytes from there; fewer at the end of the file."""
        parts: list[bytes] = []
        while num_bytes > 0 and (part := os.pread(self.fd, num_bytes, offset)):
            parts.append(part)
            offset += len(part)
            num_bytes -= len(part)
            self.bytes_read += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.fd)


class Segment:
    """What is known of one segment so far. It is true of the file whatever state it is in, and never has to be found
    again."""

    def __init__(self, name: SegmentName) -> None:
        self.name = name
        self.spec = table_spec(name.table)
        self.extents = Extents(self.spec.schema)
        self.is_whole = False
        """Sealed, and every batch of it is known."""
        self.is_damaged = False
        """Something in it, or all of it, cannot be read here; `StoreTail` reads what can be, and says what not."""
        self._schema: pa.Schema = self.spec.schema
        self._position = FIRST_MESSAGE
        self._payload = PAYLOAD.get(name.table)

    def look(self, file: Opened) -> None:
        """Take in what was written since the last look."""
        if self.is_whole or self.is_damaged:
            return
        try:
            while self._take_next(file):
                pass
            self.is_damaged = file.is_sealed and not self._is_complete()
        except _BROKEN:
            self.is_damaged = True

    def _is_complete(self) -> bool:
        """Return whether the footer was reached, behind a schema at least: who seals a segment has written into it."""
        return self.is_whole and self._position > FIRST_MESSAGE

    def batch(self, file: Opened, place: int) -> Batch:
        """Return a batch, its checksum compared. Raises BadBatch, ValueError or ArrowException where it is damaged."""
        offset, num_bytes = int(self.extents.offset[place]), int(self.extents.num_bytes[place])
        message = file.read(offset, num_bytes)
        return self.checked(message)

    def checked(self, message: bytes | memoryview) -> Batch:
        """Return the batch in a message, its checksum compared; its columns lie in the message."""
        head = read_head(memoryview(message))
        if head is None or head.kind != RECORD_BATCH or head.num_bytes != len(message):
            raise BadBatch("this is no batch")
        return checked_batch(pa.py_buffer(message), head, self._schema, self.spec)

    def without_payload(self, file: Opened, place: int) -> Batch:
        """Return a batch without its payload column, which is not read; so no checksum can be compared."""
        offset, num_bytes = int(self.extents.offset[place]), int(self.extents.num_bytes[place])
        head, rows = self._light(file, offset, file.read(offset, min(_LOOK_BYTES, num_bytes)))
        metadata = dict(head.metadata)
        return Batch(int(metadata["epoch"]), int(metadata["seq"]), rows, self.name.table)

    def _take_next(self, file: Opened) -> bool:
        """Take in the messages of one stretch; return whether there may be more."""
        look = _LOOK_BYTES if self._payload else _CHUNK_BYTES
        chunk = file.read(self._position, min(look, file.size - self._position))
        view, at = memoryview(chunk), 0
        head = read_head(view, at)
        if head is None and len(chunk) < PREFIX_BYTES + MAX_METADATA_BYTES <= file.size - self._position:
            chunk = file.read(self._position, PREFIX_BYTES + MAX_METADATA_BYTES)
            view, head = memoryview(chunk), read_head(memoryview(chunk), at)
        if head is not None and self._payload is None and len(chunk) < head.num_bytes <= file.size - self._position:
            chunk = file.read(self._position, head.num_bytes)
            view = memoryview(chunk)
        found = False
        while head is not None and not head.is_end and self._is_there(file, head, len(view) - at):
            self._take(file, view[at : at + head.num_bytes], head)
            self._position += head.num_bytes
            at += head.num_bytes
            found = True
            head = read_head(view, at) if at < len(view) else None
        if head is not None and head.is_end:
            self._end(file)
            return False
        return found

    def _is_there(self, file: Opened, head: Head, num_bytes: int) -> bool:
        if self._payload and head.kind == RECORD_BATCH:
            return self._position + head.num_bytes <= file.size
        return head.num_bytes <= num_bytes

    def _take(self, file: Opened, message: memoryview, head: Head) -> None:
        if head.kind == SCHEMA and self._position == FIRST_MESSAGE:
            schema = pa.ipc.read_schema(pa.py_buffer(message))
            if version := newer_format(schema):
                raise BadBatch(newer_text(version))
            self._schema = compatible_schema(schema, self.spec)
            return
        if head.kind != RECORD_BATCH:
            raise NotAMessage(f"a message of kind {head.kind}")
        if self._payload:
            _, rows = self._light(file, self._position, bytes(message))
            epoch = int(dict(head.metadata)["epoch"])
        else:
            batch = self.checked(bytes(message))
            rows, epoch = batch.data, batch.epoch
        self.extents.add(self._position, head.num_bytes, epoch, rows)

    def _light(self, file: Opened, offset: int, begin: bytes) -> tuple[Head, pa.RecordBatch]:
        """Return a batch's rows without the payload; begin: the first bytes of its message."""
        head = read_head(memoryview(begin))
        if head is None:
            begin = file.read(offset, PREFIX_BYTES + MAX_METADATA_BYTES)
            head = read_head(memoryview(begin))
        if head is None or head.kind != RECORD_BATCH or head.compressed:
            raise BadBatch("this is no batch")
        assert self._payload is not None, "only tables with a payload are read without one"
        skipped, skipped_bytes = buffer_places(memoryview(begin))[_payload_buffer(self._schema, self._payload)]
        if not 0 <= skipped <= skipped + skipped_bytes <= head.num_bytes:
            raise BadBatch("its buffers lie outside of it")
        message = np.zeros(head.num_bytes, np.uint8)  # memory that is never touched costs nothing
        self._fill(message, file, offset, begin, 0, skipped)
        self._fill(message, file, offset, begin, skipped + skipped_bytes, head.num_bytes)
        data = pa.ipc.read_record_batch(pa.py_buffer(message), self._schema)
        rows = with_todays_columns(data, self.spec.schema).drop_columns([self._payload])
        rows.validate(full=True)
        return head, rows

    def _fill(self, message: NDArray[np.uint8], file: Opened, offset: int, begin: bytes, start: int, end: int) -> None:
        have = min(end, len(begin))
        if start < have:
            message[start:have] = np.frombuffer(begin, np.uint8)[start:have]
        start = max(start, have)
        if start < end:
            more = np.frombuffer(file.read(offset + start, end - start), np.uint8)
            if len(more) < end - start:
                raise BadBatch("the file ends inside of it")
            message[start:end] = more

    def _end(self, file: Opened) -> None:
        if not file.is_sealed:
            return
        rest = memoryview(file.read(self._position + PREFIX_BYTES, file.size - self._position - PREFIX_BYTES))
        self.is_whole = is_footer(rest, 0)


def _payload_buffer(schema: pa.Schema, payload: str) -> int:
    """Return which buffer of a batch holds the bytes of its payload column."""
    before = schema.get_field_index(payload)
    return sum(_num_buffers(schema.field(i).type) for i in range(before)) + 2


def _num_buffers(kind: pa.DataType) -> int:
    if pa.types.is_struct(kind):
        return 1 + sum(_num_buffers(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind):
        return 2 + _num_buffers(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary(kind)
    return 3 if is_text else 2
