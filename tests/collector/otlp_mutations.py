"""Requests of OTLP that are nearly right: what an SDK sent, changed where it hurts, each by its seed alone."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from insitu_collector.otlp.bodies import GZIP_MAGIC
from insitu_collector.otlp.limits import MAX_RECORDS, MAX_REQUEST_BYTES
from insitu_collector.otlp.receiver import Encoded
from insitu_collector.otlp.signals import GROUPS, SCOPES, SIGNALS, Signal
from insitu_collector.otlp.wire import entry

CORPUS: Final = Path(__file__).parent / "otlp_corpus"
"""What OpenTelemetry's SDK for Python sends: a request of each signal as bytes, and the same in OTLP's JSON."""
LENGTHS: Final = (0, 1, 7, 8, 9, 15, 16, 17, 127, 128, 256, 257, 4096, 4097)
NUMBERS: Final = (0, 1, 13, 99, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
UNKNOWN: Final = b"\x9a\x06\x08"
"""The tag of a field 99 that nobody knows, with eight bytes."""
TOKENS: Final = (
    *(b"null", b"true", b"-1", b"1e999", b"1.5", b'"x"', b'"18446744073709551616"', b'"\\ud800"', b"[]", b"{}"),
    *(b"NaN", b"[" * 2000, b'{"arrayValue":{"values":[' * 60, b"\xff", b'"traceId":"xyz",', b'"kvlistValue":{},'),
)


@dataclass(frozen=True)
class Sent:
    """A body as it reaches the collector, and what it was before it was compressed."""

    signal: Signal
    body: Encoded


@cache
def _binary(table: str) -> bytes:
    return (CORPUS / f"{table}.bin").read_bytes()


@cache
def _json(table: str) -> bytes:
    return (CORPUS / f"{table}.json").read_bytes().strip()


def mutated(seed: int) -> Sent:
    """Return the request of a seed: over gRPC or HTTP, of any signal, in any form that is taken."""
    chance = random.Random(seed)
    signal = chance.choice(SIGNALS)
    is_json = chance.random() < 0.3
    data = _of_json(chance, signal) if is_json else _of_protobuf(chance, signal)
    is_gzip = chance.random() < 0.25
    if is_gzip:
        data = _zipped(chance, data)
    if not is_json and chance.random() < 0.5:  # gRPC says by the message itself whether it is compressed
        return Sent(signal, Encoded(data, is_gzip=data.startswith(GZIP_MAGIC)))
    return Sent(signal, Encoded(data, is_gzip=is_gzip, is_json=is_json))


def _of_protobuf(chance: random.Random, signal: Signal) -> bytes:
    message = signal.request.FromString(_binary(signal.table))
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        _change(chance, chance.choice(_messages(message)))
    data = bytearray(message.SerializeToString())
    for _ in range(chance.choice([0, 0, 0, 1, 1, 3])):
        chance.choice(BYTES)(chance, data)
    if chance.random() < 0.01:
        data += entry(GROUPS, entry(SCOPES, b"") * (MAX_RECORDS + 1))
    return bytes(data)


def _of_json(chance: random.Random, signal: Signal) -> bytes:
    data = bytearray(_json(signal.table))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
        chance.choice((_a_token, _a_token, *BYTES))(chance, data)
    return bytes(data)


def _zipped(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.02:
        return _bomb()
    packed = bytearray(gzip.compress(data, compresslevel=1, mtime=0))
    if chance.random() < 0.1:
        packed += gzip.compress(chance.choice([b"", data, bytes(1 << 20)]), compresslevel=1, mtime=0)
    if chance.random() < 0.2:
        chance.choice(BYTES)(chance, packed)
    return bytes(packed)


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(MAX_REQUEST_BYTES + 1), compresslevel=9, mtime=0)


# -- a message ---------------------------------------------------------------------------------------------------------


def _messages(message: Message) -> list[Message]:
    """Return a message and all that lie in it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                found += _messages(each)
    return found


def _change(chance: random.Random, message: Message) -> None:
    descriptor: Any = message.DESCRIPTOR  # its fields are of protobuf's own type, or of upb's
    field: FieldDescriptor = chance.choice(descriptor.fields)
    if chance.random() < 0.15:
        message.MergeFromString(UNKNOWN + chance.randbytes(8))
    elif chance.random() < 0.2:
        message.ClearField(field.name)
    elif field.is_repeated:
        _repeat(chance, message, field)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(chance, field))


def _repeat(chance: random.Random, message: Message, field: FieldDescriptor) -> None:
    values: Any = getattr(message, field.name)
    if field.type != FieldDescriptor.TYPE_MESSAGE:
        values.extend(_value(chance, field) for _ in range(chance.choice([1, 3, 200])))
        return
    for _ in range(chance.choice([1, 2, 2, 130])):
        added = values.add()
        if len(values) > 1 and chance.random() < 0.5:
            added.CopyFrom(values[0])


def _value(chance: random.Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if field.type == FieldDescriptor.TYPE_BYTES:
        length = chance.choice(LENGTHS)
        return chance.choice([bytes(length), chance.randbytes(length)])
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return chance.choice("né\x00") * chance.choice(LENGTHS)
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return chance.choice([0.0, -0.0, 1e308, float("inf"), float("nan")])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice([0, 1, 99, -1])
    bits = 64 if kind in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    number = chance.choice(NUMBERS) % 2**bits
    is_signed = kind in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_INT32)
    return number - 2**bits if is_signed and number >= 2 ** (bits - 1) else number


# -- bytes -------------------------------------------------------------------------------------------------------------


def _a_byte(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    width = min(chance.choice([1, 1, 2, 4, 10]), len(data) - at)
    data[at : at + width] = chance.choice([chance.randbytes(width), bytes(width), b"\xff" * width])


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _grow(chance: random.Random, data: bytearray) -> None:
    at = chance.choice([len(data), chance.randrange(len(data) + 1)])
    data[at:at] = chance.randbytes(chance.choice([1, 8, 64]))


def _twice(chance: random.Random, data: bytearray) -> None:
    begin = chance.randrange(len(data) + 1)
    data += data[begin:] * chance.choice([1, 1, 50])


def _a_token(chance: random.Random, data: bytearray) -> None:
    """Put something in the place of a value of JSON, or beside it."""
    places = [at + 1 for at, byte in enumerate(data) if byte in b":[,"]
    if places:
        at = chance.choice(places)
        end = at + chance.choice([0, *range(1, 12)])
        data[at:end] = chance.choice(TOKENS)


BYTES: Final[tuple[Callable[[random.Random, bytearray], None], ...]] = (_a_byte, _a_byte, _cut, _grow, _twice)
