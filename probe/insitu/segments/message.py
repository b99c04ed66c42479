"""The head of one encapsulated Arrow IPC message, read by hand. Torch-free, pure.

pyarrow can parse a message only once all of it is there, and does not show a batch's custom metadata without a
stream reader. A half-written tail and a frame nobody has checked yet both need the lengths first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

CONTINUATION: Final = b"\xff\xff\xff\xff"
END_MARK: Final = CONTINUATION + bytes(4)
MAGIC: Final = b"ARROW1"
"""The first and the last bytes of a file of messages."""
PREFIX_BYTES: Final = 8
"""Continuation marker and the int32 length of the metadata."""
END: Final = 0
SCHEMA: Final = 1
RECORD_BATCH: Final = 3
MAX_METADATA_BYTES: Final = 1 << 20
"""More than any table of ours needs; a larger length is damage."""


class NotAMessage(ValueError):
    """The bytes are no Arrow message."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a message says of itself before its body is looked at."""

    kind: int
    """`SCHEMA`, `RECORD_BATCH`, another header type, or `END` of the stream."""
    num_bytes: int
    """Whole message: prefix, metadata and body."""
    num_rows: int = 0
    compressed: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    """Custom metadata, in stored order."""

    @property
    def is_end(self) -> bool:
        return self.kind == END


def read_head(data: memoryview, at: int = 0) -> Head | None:
    """Return the head of the message at `at`, or None when its prefix or metadata is not all there.

    Raises NotAMessage when the bytes cannot be one.
    """
    prefix = bytes(data[at : at + PREFIX_BYTES])
    if prefix[:4] != CONTINUATION[: len(prefix)]:
        raise NotAMessage("no continuation marker")
    if len(prefix) < PREFIX_BYTES:
        return None
    (metadata_bytes,) = struct.unpack_from("<i", prefix, 4)
    if metadata_bytes == 0:
        return Head(kind=END, num_bytes=PREFIX_BYTES)
    if not 0 < metadata_bytes <= MAX_METADATA_BYTES:
        raise NotAMessage(f"metadata of {metadata_bytes} bytes")
    metadata = data[at + PREFIX_BYTES : at + PREFIX_BYTES + metadata_bytes]
    if len(metadata) < metadata_bytes:
        return None
    try:
        return _head_of(metadata)
    except (struct.error, UnicodeDecodeError) as error:
        raise NotAMessage(str(error)) from None


def head_bytes(data: memoryview, at: int) -> int:
    """Return the bytes of prefix and metadata, with its padding, of the message at `at`, which has been read."""
    return PREFIX_BYTES + _unpack(data, "<i", at + 4)


def buffer_places(data: memoryview, at: int = 0) -> list[tuple[int, int]]:
    """Return where each buffer of the record batch at `at` lies: offset from `at`, and bytes, in the order of columns.

    Its metadata must all be there; raises NotAMessage where they are damaged.
    """
    (metadata_bytes,) = struct.unpack_from("<i", data, at + 4)
    metadata = data[at + PREFIX_BYTES : at + PREFIX_BYTES + metadata_bytes]
    try:
        batch = _Table(metadata, _offset(metadata, 0)).table(2)
        found = [] if batch is None else batch.pairs(2)
    except struct.error as error:
        raise NotAMessage(str(error)) from None
    return [(PREFIX_BYTES + metadata_bytes + offset, num_bytes) for offset, num_bytes in found]


def hides_a_batch(data: memoryview, at: int) -> bool:
    """Return whether a mark of the end at `at` is really a batch of ours whose length was damaged."""
    metadata = data[at + PREFIX_BYTES : at + PREFIX_BYTES + MAX_METADATA_BYTES]
    try:
        return any(key == "crc32" for key, _ in _head_of(metadata).metadata)
    except (struct.error, ValueError):
        return False


def header_at(metadata: memoryview) -> int:
    """Return where in the metadata of a message the table of its header begins (`Schema`, `RecordBatch`).

    Raises NotAMessage when there is none.
    """
    try:
        header = _Table(metadata, _offset(metadata, 0)).table(2)
    except struct.error as error:
        raise NotAMessage(str(error)) from None
    if header is None:
        raise NotAMessage("a message without a header")
    return header.at


def _head_of(metadata: memoryview) -> Head:
    message = _Table(metadata, _offset(metadata, 0))
    kind = message.scalar(1, "<B")
    if kind == END:
        raise NotAMessage("a message without a header")
    body_bytes = message.scalar(3, "<q")
    if body_bytes < 0:
        raise NotAMessage(f"body of {body_bytes} bytes")
    num_rows, compressed = 0, False
    if kind == RECORD_BATCH:
        batch = message.table(2)
        if batch is None:
            raise NotAMessage("a record batch without its header")
        num_rows, compressed = batch.scalar(0, "<q"), batch.table(3) is not None
    pairs = tuple((pair.text(0), pair.text(1)) for pair in message.tables(4))
    return Head(kind, PREFIX_BYTES + len(metadata) + body_bytes, num_rows, compressed, pairs)


class _Table:
    """One flatbuffer table: fields by number, absent ones read as 0, None or empty."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self.at = at
        self._vtable = at - _unpack(data, "<i", at)
        self._num_fields = (_unpack(data, "<H", self._vtable) - 4) // 2

    def _place(self, field: int) -> int | None:
        if field >= self._num_fields:
            return None
        offset = _unpack(self._data, "<H", self._vtable + 4 + 2 * field)
        return self.at + offset if offset else None

    def scalar(self, field: int, kind: str) -> int:
        place = self._place(field)
        return 0 if place is None else _unpack(self._data, kind, place)

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        return None if place is None else _Table(self._data, _offset(self._data, place))

    def tables(self, field: int) -> list[_Table]:
        place = self._place(field)
        if place is None:
            return []
        vector = _offset(self._data, place)
        num_entries = _unpack(self._data, "<I", vector)
        if num_entries > len(self._data):
            raise NotAMessage(f"{num_entries} metadata entries")
        return [_Table(self._data, _offset(self._data, vector + 4 + 4 * i)) for i in range(num_entries)]

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """Return a vector of structs of two int64."""
        place = self._place(field)
        if place is None:
            return []
        vector = _offset(self._data, place)
        num_bytes = 16 * _unpack(self._data, "<I", vector)
        if num_bytes > len(self._data):
            raise NotAMessage(f"{num_bytes} bytes of buffers")
        return list(struct.iter_unpack("<qq", self._data[vector + 4 : vector + 4 + num_bytes]))

    def text(self, field: int) -> str:
        place = self._place(field)
        if place is None:
            return ""
        start = _offset(self._data, place)
        return bytes(self._data[start + 4 : start + 4 + _unpack(self._data, "<I", start)]).decode()


def _unpack(data: memoryview, kind: str, at: int) -> int:
    if at < 0:  # struct would count a negative place from the end
        raise NotAMessage("an offset before the message")
    return int(struct.unpack_from(kind, data, at)[0])


def _offset(data: memoryview, at: int) -> int:
    """Follow the relative offset stored at `at`."""
    return at + _unpack(data, "<I", at)
