"""Frames that are nearly right: every table's golden batches, changed where it hurts, each by its seed alone."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pyarrow as pa

from insitu.records import TableSpec, versions_of
from insitu.segments.message import PREFIX_BYTES
from insitu.wire.insitu_pb2 import Frame

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "segments"
EPOCH: Final = 0x0123456789ABCDEF
"""Of the golden rows."""
EDGES: Final = (0, 1, 2, -1, 7, 8, 64, 1 << 16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Sample:
    """A right frame, and where in its body the numbers lie that a parser believes."""

    frame: Frame
    lengths: tuple[int, ...]
    """Places of int64: rows, nodes (length, nulls), buffers (offset, length), length of the body."""
    heads: tuple[int, ...]
    """Places of 4 bytes in the metadata: offsets, vtables, their entries."""
    body_at: int


@cache
def samples() -> tuple[Sample, ...]:
    """Return the batches of all golden segments: each table, each version of it, with rows and without."""
    return tuple(_sample(frame) for path in sorted(GOLDEN.glob("*.arrow")) for frame in _frames(path))


def _frames(path: Path) -> list[Frame]:
    with pa.ipc.open_file(path) as file:
        schema = file.schema.remove_metadata()
        (spec,) = (each for each in versions_of(path.stem.partition("-")[0]) if each.schema.equals(schema))
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    return [_frame(spec, seq, batch) for seq, batch in enumerate(batches)]


def _frame(spec: TableSpec, seq: int, rows: pa.RecordBatch) -> Frame:
    body = rows.replace_schema_metadata(None).serialize().to_pybytes()
    crc32 = zlib.crc32(body)
    return Frame(stream=spec.stream, seq=seq, schema=spec.digest, num_rows=rows.num_rows, crc32=crc32, body=body)


def _sample(frame: Frame) -> Sample:
    (metadata_bytes,) = struct.unpack_from("<i", frame.body, 4)
    return Sample(
        frame,
        tuple(_lengths(frame.body)),
        tuple(range(PREFIX_BYTES, PREFIX_BYTES + metadata_bytes - 3, 4)),
        PREFIX_BYTES + metadata_bytes,
    )


def _lengths(body: bytes) -> list[int]:
    """Return the places of the int64 of a record batch message, by way of its flatbuffer tables."""
    message = _follow(body, PREFIX_BYTES)
    batch = _follow(body, _field(body, message, 2))
    places = [_field(body, message, 3), _field(body, batch, 0)]
    for number in (1, 2):  # nodes and buffers: vectors of two int64 each
        vector = _follow(body, _field(body, batch, number))
        (num_entries,) = struct.unpack_from("<I", body, vector)
        places += range(vector + 4, vector + 4 + 16 * num_entries, 8)
    return [place for place in places if place]


def _follow(body: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", body, at)[0])


def _field(body: bytes, table: int, number: int) -> int:
    """Return where a field of a table lies; 0 when it is left out."""
    vtable = table - int(struct.unpack_from("<i", body, table)[0])
    (num_bytes,) = struct.unpack_from("<H", body, vtable)
    offset = int(struct.unpack_from("<H", body, vtable + 4 + 2 * number)[0]) if 4 + 2 * number < num_bytes else 0
    return table + offset if offset else 0


def mutated(seed: int) -> Frame:
    """Return the frame of a seed."""
    chance = random.Random(seed)
    sample = chance.choice(samples())
    frame = Frame()
    frame.CopyFrom(sample.frame)
    body = bytearray(frame.body)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        chance.choice(MUTATIONS)(chance, sample, frame, body)
    frame.body = bytes(body)
    if chance.random() < 0.93:
        frame.crc32 = zlib.crc32(frame.body)
    return frame


def _a_byte(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    _overwrite(chance, body, chance.randrange(len(body) or 1))


def _a_value(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    if sample.body_at < len(body):
        _overwrite(chance, body, chance.randrange(sample.body_at, len(body)))


def _overwrite(chance: random.Random, body: bytearray, at: int) -> None:
    width = min(chance.choice([1, 1, 2, 4, 8]), len(body) - at)
    body[at : at + width] = chance.choice([chance.randbytes(width), bytes(width), b"\xff" * width])


def _a_length(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    place = chance.choice(sample.lengths)
    if place + 8 <= len(body):
        (now,) = struct.unpack_from("<q", body, place)
        near = (now + chance.choice([-8, -1, 1, 8]), len(body), chance.randrange(256), chance.choice(EDGES))
        struct.pack_into("<Q", body, place, chance.choice(near) % 2**64)


def _an_offset_in_the_head(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    place = chance.choice(sample.heads)
    if place + 4 <= len(body):
        struct.pack_into("<I", body, place, chance.choice([chance.randrange(256), chance.choice(EDGES) % 2**32]))


def _an_offset_in_a_column(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    if sample.body_at + 8 <= len(body):
        place = chance.randrange(sample.body_at, len(body) - 7, 4)
        struct.pack_into("<I", body, place, chance.choice(EDGES) % 2**32)


def _cut(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    del body[chance.randrange(len(body) + 1) :]


def _grow(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    body += chance.randbytes(chance.choice([1, 8, 64]))


def _splice(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    other = chance.choice(samples())
    at = chance.choice([sample.body_at, chance.randrange(len(body) + 1)])
    start = chance.choice([other.body_at, min(at, len(other.frame.body))])
    body[at:] = other.frame.body[start:]


def _another_schema(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    other = chance.choice(samples()).frame
    frame.schema = other.schema
    if chance.random() < 0.8:
        frame.stream = other.stream


def _another_count(chance: random.Random, sample: Sample, frame: Frame, body: bytearray) -> None:
    frame.num_rows = chance.choice([0, 1, min(frame.num_rows + 1, 2**32 - 1), 2**32 - 1])


MUTATIONS: Final[tuple[Callable[[random.Random, Sample, Frame, bytearray], None], ...]] = (
    *(_a_byte, _a_value, _a_value, _a_length, _a_length, _an_offset_in_the_head, _an_offset_in_a_column),
    *(_cut, _grow, _splice, _another_schema, _another_count),
)
