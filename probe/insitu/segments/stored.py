"""A batch as it lies in a file, checked before it is believed, and which schemas can be read here. Torch-free."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import VERSION, TableSpec, table_spec, with_todays_columns
from insitu.segments.layout import Key
from insitu.segments.message import Head


class BadBatch(ValueError):
    """A batch that is not what its writer wrote."""


def newer_format(schema: pa.Schema) -> str:
    """Return the format version of a file whose schema has this metadata, if it is one that we cannot read, else ""."""
    version = str((schema.metadata or {}).get(b"insitu.version", b"").decode(errors="replace"))
    major, ours = version.partition(".")[0], VERSION.partition(".")[0]
    return version if major.isdecimal() and int(major) > int(ours) else ""


def newer_text(version: str) -> str:
    """Return, for people, why a file of a newer format is left out."""
    return f"it was written by a newer insitu (format {version}; this one reads {VERSION}): update insitu to read it"


def checked_batch(message: pa.Buffer, head: Head, schema: pa.Schema, spec: TableSpec) -> Batch:
    """Return the batch in a message, with today's columns. Raises BadBatch or ArrowException when it is damaged."""
    stored = stored_batch(message, head, schema, spec)
    batch = Batch(stored.key.epoch, stored.key.seq, with_todays_columns(stored.data, spec.schema), spec.name)
    if batch.data is stored.data:
        batch.__dict__["crc32"] = stored.crc32  # known: not computed again by who writes it elsewhere
    return batch


@dataclass(frozen=True, slots=True)
class Stored:
    """A batch as it lies in a file: with the columns of whoever wrote it, and their checksum."""

    key: Key
    crc32: int
    data: pa.RecordBatch


def stored_batch(message: pa.Buffer, head: Head, schema: pa.Schema, spec: TableSpec) -> Stored:
    """Return the batch in a message as it was written. Raises BadBatch or ArrowException when it is damaged."""
    metadata = dict(head.metadata)
    try:
        epoch, stream, seq, crc32 = (int(metadata[key]) for key in ("epoch", "stream", "seq", "crc32"))
    except (KeyError, ValueError) as error:
        raise BadBatch(f"batch metadata: {error}") from None
    data = pa.ipc.read_record_batch(message, schema)
    data.validate(full=True)  # before anything else looks inside: damaged offsets would end the process
    if zlib.crc32(data.serialize()) != crc32:
        raise BadBatch("the checksum is another one")
    if stream != spec.stream or (data.num_rows and data.column(0)[0].as_py() != epoch):
        raise BadBatch("the batch belongs to another stream")
    return Stored(Key(epoch, stream, seq), crc32, data)


def compatible_schema(stored: pa.Schema, spec: TableSpec) -> pa.Schema:
    """Return the schema to read a file with: its own when it is this table's, older or newer by nullable columns.

    Anything else is damage, and the known schema is tried: the checksums decide.
    """
    return stored.remove_metadata() if is_known(stored, spec.name) else spec.schema


def is_known(stored: pa.Schema, table: str) -> bool:
    """Return whether a schema is a table's: today's, an older one's, or a newer one's with further nullable columns."""
    schema = table_spec(table).schema
    num_shared = min(len(stored), len(schema))
    shared = all(stored.field(i).equals(schema.field(i)) for i in range(num_shared))
    added = [stored.field(i) for i in range(num_shared, len(stored))]
    return shared and num_shared > 0 and all(field.nullable for field in added)
