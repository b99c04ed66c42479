"""Is a frame what it says: length, checksum, schema, content, in an order in which nothing unproven is parsed. Pure."""

from __future__ import annotations

import zlib
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Batch, Refused
from insitu.intake import MAX_FRAME_BYTES
from insitu.records import column_with_nulls, schema_of, spec_by_digest, with_todays_columns
from insitu.segments.message import RECORD_BATCH, read_head
from insitu.vocabulary import DropReason, FrameDefect
from insitu.wire.insitu_pb2 import Frame

MAX_SEQ: Final = (1 << 63) - 1
"""The highest that `gaps` can tell of."""


class Invalid(Refused):
    """A frame that is wrong, and what of it."""

    def __init__(self, defect: FrameDefect, detail: str) -> None:
        super().__init__(DropReason.REFUSED_INVALID, detail)
        self.defect = defect


def checked_batch(epoch: int, frame: Frame, body: bytes | None = None, max_bytes: int = MAX_FRAME_BYTES) -> Batch:
    """Return the batch in a frame of at most `max_bytes`. Raises Invalid, for good, with what is wrong.

    body: the frame's, where somebody has looked at it already.

    The order matters: nothing is parsed before its length and checksum are right, nothing inside is looked at
    before it is validated (unvalidated Arrow bytes can end the process).
    """
    if body is None:
        body = frame.body  # once: each look at it is a copy
    if frame.seq > MAX_SEQ:
        raise Invalid(FrameDefect.SEQ, f"frame {frame.seq} of a stream; the highest is {MAX_SEQ}")
    _check_bytes(body, frame.crc32, max_bytes)
    spec = spec_by_digest(frame.schema)
    if spec is None or spec.stream != frame.stream:
        raise Invalid(
            FrameDefect.UNKNOWN_SCHEMA,
            f"stream {frame.stream} has no schema {frame.schema:#018x} here; update the collector",
        )
    try:
        data = pa.ipc.read_record_batch(pa.py_buffer(body), spec.schema)
        data.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        detail = f"not a record batch of {spec.name}: {str(error).splitlines()[0]}"
        raise Invalid(FrameDefect.NOT_A_BATCH, detail) from None
    if data.num_rows != frame.num_rows:
        raise Invalid(FrameDefect.NUM_ROWS, f"{frame.num_rows} rows announced, {data.num_rows} came")
    _check_identity(epoch, spec.name, data)
    batch = Batch(epoch, frame.seq, with_todays_columns(data, schema_of(spec.name)), spec.name)
    if batch.data is data and data.serialize().equals(pa.py_buffer(body)):
        batch.__dict__.update(body=body, crc32=frame.crc32)  # both are known: not computed again
    else:
        _check_written(batch)
    return batch


def _check_written(batch: Batch) -> None:
    """Refuse what does not come back from a segment as it is.

    A valid batch may be written as other bytes than came: with other padding, say, so its checksum is another one. And
    an empty column with wild offsets passes as valid, but Arrow writes it as bytes that it cannot read.
    """
    try:
        head = read_head(memoryview(batch.body))
        again = pa.ipc.read_record_batch(pa.py_buffer(batch.body), batch.data.schema)
        again.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        detail = f"not a record batch of {batch.table}: {str(error).splitlines()[0]}"
        raise Invalid(FrameDefect.NOT_A_BATCH, detail) from None
    if head is None or head.num_bytes != len(batch.body) or again.serialize() != pa.py_buffer(batch.body):
        detail = f"not a record batch of {batch.table}: it is not read as it is written"
        raise Invalid(FrameDefect.NOT_A_BATCH, detail)


def _check_bytes(body: bytes, crc32: int, max_bytes: int) -> None:
    num_bytes = len(body)
    if num_bytes > max_bytes:
        raise Invalid(FrameDefect.TOO_LONG, f"a frame of {num_bytes} bytes; the most is {max_bytes}")
    if zlib.crc32(body) != crc32:
        raise Invalid(FrameDefect.CHECKSUM, "the checksum is another one")
    try:
        head = read_head(memoryview(body))
    except ValueError as error:
        raise Invalid(FrameDefect.NOT_A_BATCH, f"not an Arrow message: {error}") from None
    if head is None or head.num_bytes != num_bytes or head.kind != RECORD_BATCH:
        raise Invalid(FrameDefect.NOT_A_BATCH, "not exactly one record batch")
    if head.compressed:
        raise Invalid(FrameDefect.COMPRESSED, "a compressed body; send it plain")


def _check_identity(epoch: int, table: str, data: pa.RecordBatch) -> None:
    if (column := column_with_nulls(table, data)) is not None:
        raise Invalid(FrameDefect.IDENTITY, f"column {column} has nulls")
    if data.num_rows and not bool((data.column("epoch").to_numpy() == epoch).all()):
        raise Invalid(FrameDefect.IDENTITY, "rows of another epoch than the connection's")
    if data.num_rows and int(data.column("row_seq").to_numpy().min()) < 0:
        raise Invalid(FrameDefect.IDENTITY, "a negative row_seq")
