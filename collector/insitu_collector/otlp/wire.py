"""Cutting a protobuf message at one of its repeated fields, without a copy of what it holds. Pure.

A full parse of a request makes an object of everything in it, a hundred times the bytes of a hostile one. This reads
only where fields begin and end, so that each record can be parsed, checked and let go by itself, and its bytes are
those that came.
"""

from __future__ import annotations

from typing import Final

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5
_MAX_VARINT_BYTES: Final = 10
_MAX_TAG_BYTES: Final = 5

Range = tuple[int, int]
"""Where something begins and ends in the bytes."""


class Malformed(ValueError):
    """The bytes are no protobuf message."""


class TooMany(ValueError):
    """A repeated field has more entries than are taken."""


def cut(data: bytes, within: Range, number: int, most: int) -> tuple[bytes, list[Range]]:
    """Return all other fields, as they came, and where each entry of the length-delimited field `number` lies.

    Raises Malformed; TooMany as soon as there are more than `most`.
    """
    at, end = within
    key = number << 3 | BYTES
    assert key < 0x80, "the tag is one byte"
    rest: list[bytes] = []
    found: list[Range] = []
    try:
        while at < end:
            if data[at] == key:
                size = data[at + 1]
                begin = at + 2
                if size >= 0x80:
                    begin, size = _long_size(data, at + 1)
                stop = begin + size
                found.append((begin, stop))
                if len(found) > most:
                    raise TooMany(f"more than {most} entries")
            else:
                stop, entry = _field(data, at, key)
                if entry is None:
                    rest.append(data[at:stop])
                else:
                    found.append(entry)
            at = stop
    except IndexError:
        raise Malformed("it ends within a field") from None
    if at > end:
        raise Malformed("a field is longer than what holds it")
    return b"".join(rest), found


def _field(data: bytes, at: int, key: int) -> tuple[int, Range | None]:
    """Return where the field at `at` ends, and its content if it is the wanted one, written in an unusual way."""
    tag, begin = _varint(data, at)
    kind = tag & 7
    if tag >> 3 == 0:
        raise Malformed("a field without a number")
    if tag >> 32 or begin - at > _MAX_TAG_BYTES:
        raise Malformed("a field number that is too large")
    if kind == BYTES:
        size, begin = _varint(data, begin)
        return begin + size, (begin, begin + size) if tag == key else None
    if kind == VARINT:
        return _varint(data, begin)[1], None
    if kind in (FIXED64, FIXED32):
        return begin + (8 if kind == FIXED64 else 4), None
    raise Malformed(f"a field of wire type {kind}")


def _long_size(data: bytes, at: int) -> Range:
    """Return where the content begins, and a size of two bytes or more: that of nearly every record has two."""
    low, high = data[at], data[at + 1]
    if high < 0x80:
        return at + 2, low & 0x7F | high << 7
    size, begin = _varint(data, at)
    return begin, size


def _varint(data: bytes, at: int) -> Range:
    """Return a number and where it ends."""
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise Malformed("a number that does not end")


def entry(number: int, content: bytes) -> bytes:
    """Return one entry of the length-delimited field `number`: the inverse of `cut`."""
    size = len(content)
    head = bytearray((number << 3 | BYTES,))
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + content
