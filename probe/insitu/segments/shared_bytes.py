"""Rows that share a resource or a scope, when some of them go: what the first had is the next one's. Pure."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

SHARED: Final = (("resource", "resource_row"), ("scope", "scope_row"))
"""Columns of `spans`, `metrics` and `logs`: bytes that one of several rows has, and which row has them."""


def kept_of(data: pa.RecordBatch, kept: pa.Array) -> pa.RecordBatch:
    """Return the rows of a batch that are kept (bool [rows]); each still finds among them what it shares."""
    left = data.filter(kept)
    if SHARED[0][0] not in data.schema.names:
        return left
    gone = data.filter(pc.invert(kept))
    for column, pointer in SHARED:
        of_gone = zip(gone.column("row_seq").to_pylist(), gone.column(column).to_pylist(), strict=True)
        left = _handed_on(left, column, pointer, {row: value for row, value in of_gone if value is not None})
    return left


def _handed_on(left: pa.RecordBatch, column: str, pointer: str, lost: dict[int, bytes]) -> pa.RecordBatch:
    numbers, values = left.column("row_seq").to_pylist(), left.column(column).to_pylist()
    pointers: list[int | None] = left.column(pointer).to_pylist()
    heirs: dict[int, int] = {}
    for i, owner in enumerate(pointers):
        if owner is not None and owner in lost:
            if owner not in heirs:
                heirs[owner], values[i] = numbers[i], lost[owner]
            pointers[i] = heirs[owner]
    if not heirs:
        return left
    for name, changed in ((column, values), (pointer, pointers)):
        left = _with_column(left, name, changed)
    return left


def _with_column(data: pa.RecordBatch, name: str, values: list[Any]) -> pa.RecordBatch:
    place = data.schema.get_field_index(name)
    field = data.schema.field(place)
    return data.set_column(place, field, pa.array(values, field.type))
