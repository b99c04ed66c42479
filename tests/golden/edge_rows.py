"""Rows for any schema: a plain value, one at an edge of its type, and null, in every column. Knows only pyarrow."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

EPOCH: Final = 0x0123456789ABCDEF
NUM_ROWS: Final = 3
NUM_IDENTITY: Final = 4
"""Columns that say who wrote a row; none of them is ever null."""


def value(kind: pa.DataType, row: int) -> Any:
    """Return the value of a nullable column: row 0 plain, row 1 at an edge of the type, row 2 null."""
    if row == 2:
        return None
    if pa.types.is_boolean(kind):
        return row == 0
    if pa.types.is_integer(kind):
        signed = not pa.types.is_unsigned_integer(kind)
        return 40 if row == 0 else 2 ** (kind.bit_width - signed) - 1
    if pa.types.is_floating(kind):
        return 0.5 if row == 0 else float("-inf")
    if pa.types.is_large_binary(kind):
        return b"\x00\x01\xff" if row == 0 else b""
    if pa.types.is_list(kind):
        return [value(kind.value_type, 0), value(kind.value_type, 1)] if row == 0 else []
    if pa.types.is_struct(kind):
        return {field.name: value(field.type, row) for field in kind}
    return "Größe" if row == 0 else ""


def edge_rows(schema: pa.Schema, first: int = 10) -> list[dict[str, Any]]:
    """Return `NUM_ROWS` rows of a table; first: `row_seq` of the first."""
    columns = list(schema)[NUM_IDENTITY:]
    return [
        {
            "epoch": EPOCH,
            "rank": 1,
            "stage": -1,
            "row_seq": first + row,
            **{field.name: value(field.type, row) for field in columns},
        }
        for row in range(NUM_ROWS)
    ]
