"""Record batches on their way from a collector to a reader, and back. Pure.

What comes back is checked before anything looks inside: length, checksum, head, and then every offset.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.segments.message import RECORD_BATCH, read_head
from insitu.wire.insitu_pb2 import End, Hidden, Part, Piece
from insitu_collector.query.asked import BadQuestion

TARGET_BYTES: Final = 1 << 20
"""Of a batch that is sent; one row may be larger."""
PIECE_BYTES: Final = 2 << 20
"""Most of a message: gRPC takes 4 MiB unless it is told otherwise."""
MOST_BYTES: Final = 256 << 20
"""Most of one batch that a reader puts together."""


class BadAnswer(ConnectionError):
    """What a collector answered is damaged, or not whole; the text is one line for the user."""


def parts_of(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[Part]:
    """Yield the messages of an answer but for its end. Raises BadQuestion for a column that cannot be sent, and for
    a row that is too large."""
    plain = _plain_schema(schema)
    yield Part(schema=plain.serialize().to_pybytes())
    for batch in batches:
        for small in _small(_plain(batch, plain)):
            if small.nbytes > MOST_BYTES:
                raise BadQuestion(_too_large(f"a row of {small.nbytes >> 20} MiB"))
            yield from _pieces(small.serialize().to_pybytes())


def end_of(num_rows: int, num_damaged: int, hidden: Mapping[int, int] | None = None, begun_unix_ns: int = 0) -> Part:
    """Return the message that says that an answer is whole. hidden: rows that are left out, by epoch."""
    left_out = [Hidden(epoch=epoch, num_rows=num) for epoch, num in (hidden or {}).items()]
    return Part(end=End(num_rows=num_rows, num_damaged=num_damaged, hidden=left_out, begun_unix_ns=begun_unix_ns))


class Counted:
    """Batches, and how many rows they had."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.num_rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.num_rows += batch.num_rows
            yield batch


class Answer:
    """An answer as it comes in: its schema, then its batches."""

    def __init__(self, parts: Iterator[Part], schema: pa.Schema | None = None) -> None:
        """schema: where it is known from an earlier answer, so that none comes; else waits for it. Raises BadAnswer."""
        self._parts = parts
        self.end = End()
        """Known when the last batch was given."""
        if schema is not None:
            self.schema: pa.Schema = schema
            return
        first = next(parts, None)
        if first is None or first.WhichOneof("m") != "schema":
            raise BadAnswer("the answer has no schema; ask again")
        try:
            self.schema = pa.ipc.read_schema(pa.py_buffer(first.schema))
        except (pa.ArrowException, OSError) as error:
            raise BadAnswer(f"the answer's schema cannot be read ({error}); ask again") from None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches, each checked. Raises BadAnswer where one is damaged or the end is missing."""
        body, num_rows = bytearray(), 0
        for part in self._parts:
            kind = part.WhichOneof("m")
            if kind == "end":
                if body or part.end.num_rows != num_rows:
                    raise BadAnswer(f"the answer has {num_rows} rows and says {part.end.num_rows}; ask again")
                self.end = part.end
                return
            if kind != "piece":
                raise BadAnswer("the answer is none that this version reads; update insitu here")
            if len(body) + len(part.piece.body) > MOST_BYTES:
                raise BadAnswer(_too_large("a row"))
            body += part.piece.body
            if part.piece.is_last:
                batch = checked(bytes(body), part.piece.crc32, self.schema)
                num_rows += batch.num_rows
                body.clear()
                yield batch
        raise BadAnswer("the answer ended before its end; ask again")


def checked(body: bytes, crc32: int, schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch in the bytes of a stranger. Raises BadAnswer."""
    if zlib.crc32(body) != crc32:
        raise BadAnswer("a batch of the answer changed on its way; ask again")
    try:
        head = read_head(memoryview(body))
        if head is None or head.kind != RECORD_BATCH or head.compressed or head.num_bytes != len(body):
            raise BadAnswer("a batch of the answer is none")
        batch = pa.ipc.read_record_batch(pa.py_buffer(body), schema)
        batch.validate(full=True)
    except (ValueError, OSError, pa.ArrowException) as error:
        if isinstance(error, BadAnswer):
            raise
        raise BadAnswer(f"a batch of the answer is damaged ({error})") from None
    return batch


def _too_large(what: str) -> str:
    return f"{what} is more than the {MOST_BYTES >> 20} MiB that an answer may have in one; ask for less of it"


def _pieces(body: bytes) -> Iterator[Part]:
    crc32 = zlib.crc32(body)
    for at in range(0, len(body), PIECE_BYTES):
        is_last = at + PIECE_BYTES >= len(body)
        piece = Piece(body=body[at : at + PIECE_BYTES], is_last=is_last, crc32=crc32 if is_last else 0)
        yield Part(piece=piece)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield a batch in slices of about `TARGET_BYTES`."""
    num = max(1, batch.num_rows * TARGET_BYTES // max(batch.nbytes, 1))
    yield from (batch.slice(at, num) for at in range(0, batch.num_rows, num))


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    fields = []
    for each in schema:
        kind = each.type.value_type if pa.types.is_dictionary(each.type) else each.type
        if _has_dictionary(kind):
            raise BadQuestion(f"column {each.name!r} is of type {kind}, which is not sent; cast it in the query")
        fields.append(pa.field(each.name, kind, each.nullable))
    return pa.schema(fields)


def _has_dictionary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    return any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _plain(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema):
        return batch
    columns = [
        pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
