"""The end of a segment: end mark, Arrow footer, its length and the magic. Torch-free, pure.

pyarrow writes a footer only behind messages that it has written itself; recovery finishes files of writers that died.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from insitu.segments.message import END_MARK, MAGIC, PREFIX_BYTES, header_at

ALIGNMENT: Final = 8

_START: Final = struct.Struct("<I 6H iIIIhxx I4xI")
"""Place of the table; its vtable; the table; the (empty) vector of dictionaries; the length of that of blocks."""
_BLOCK: Final = struct.Struct("<qi4xq")
_VTABLE_AT: Final = 4
_TABLE_AT: Final = 16
_TABLE_BYTES: Final = 20
_SCHEMA_AT, _DICTIONARIES_AT, _BLOCKS_AT, _VERSION_AT = 4, 8, 12, 16
"""Fields, from where the table begins."""
_NO_DICTIONARIES_AT: Final = 36
_NUM_BLOCKS_AT: Final = 44
"""So that the blocks behind it are aligned."""
_V5: Final = 4


@dataclass(frozen=True, slots=True)
class Block:
    """Where a message lies in its file, in bytes."""

    offset: int
    head_bytes: int
    """Prefix and metadata, with its padding."""
    num_bytes: int
    """All of it."""

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def closing(schema_message: bytes, blocks: Iterable[Block]) -> bytes:
    """Return what follows the last message of an Arrow file that has this schema and these record batches.

    schema_message: as it begins the stream, with its prefix. Raises NotAMessage when it is none.
    """
    footer = _footer(schema_message[PREFIX_BYTES:], list(blocks))
    return END_MARK + footer + struct.pack("<i", len(footer)) + MAGIC


def _footer(schema: bytes, blocks: list[Block]) -> bytes:
    """Return the flatbuffer `Footer`: a table of fixed layout, the blocks, and the schema's own flatbuffer as it is."""
    schema_at = _START.size + len(blocks) * _BLOCK.size
    assert schema_at % ALIGNMENT == 0, "what is aligned in the message is aligned in the footer"
    start = _START.pack(
        _TABLE_AT,
        *(_TABLE_AT - _VTABLE_AT, _TABLE_BYTES, _VERSION_AT, _SCHEMA_AT, _DICTIONARIES_AT, _BLOCKS_AT),
        _TABLE_AT - _VTABLE_AT,
        schema_at + header_at(memoryview(schema)) - (_TABLE_AT + _SCHEMA_AT),
        _NO_DICTIONARIES_AT - (_TABLE_AT + _DICTIONARIES_AT),
        _NUM_BLOCKS_AT - (_TABLE_AT + _BLOCKS_AT),
        _V5,
        0,
        len(blocks),
    )
    packed = [_BLOCK.pack(block.offset, block.head_bytes, block.num_bytes - block.head_bytes) for block in blocks]
    return b"".join((start, *packed, schema))
