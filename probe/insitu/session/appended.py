"""Rows that callers append: checked at the call, since the drain could only drop what no column takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import pyarrow as pa

from insitu.records import lacking, schema_of
from insitu.session.row_map import is_unicode

_TAKES: Final = (
    (pa.types.is_string, "text"),
    (pa.types.is_integer, "a whole number"),
    (pa.types.is_floating, "a number"),
)


def checked(table: str, row: Any) -> dict[str, Any]:
    """Return a copy of a row that its table can hold.

    Raises KeyError for an unknown table or column, ValueError, one line, for what is no row, for a value that its
    column cannot take and where one is missing that readers need (`insitu.records.NEEDED`).
    """
    schema = schema_of(table)
    if not isinstance(row, Mapping):
        raise ValueError(f"row: {row!a:.80} is no row of {table}; write a dict of its columns")
    columns = _columns(table)
    unknown = [str(name) for name in row if name not in columns]
    if unknown:
        raise KeyError(f"table {table} has no column {', '.join(sorted(unknown))}")
    if (column := lacking(table, row)) is not None:
        raise ValueError(f"a row of {table} needs {column}; give it a value")
    for name, value in row.items():
        if value is not None and not _is_plain(value, columns[name]) and not _fits(value, schema.field(name).type):
            raise ValueError(f"{name}: {value!a:.80} is no value of {table}.{name}, which takes {_taken(table, name)}")
    return dict(row)


@cache
def _columns(table: str) -> dict[str, range | type | None]:
    """Return by column what can be told at a glance: the bounds of whole numbers, or text."""
    return {field.name: _glance(field.type) for field in schema_of(table)}


def _glance(kind: pa.DataType) -> range | type | None:
    if pa.types.is_integer(kind):
        least = -(2 ** (kind.bit_width - 1)) if pa.types.is_signed_integer(kind) else 0
        return range(least, least + 2**kind.bit_width)
    return str if pa.types.is_string(kind) else None


def _is_plain(value: Any, glance: range | type | None) -> bool:
    if type(value) is int:
        return type(glance) is range and value in glance
    return type(value) is str and glance is str and is_unicode(value)


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Tell whether Arrow makes a value of this type of it, as the drain will ask it to."""
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _taken(table: str, name: str) -> str:
    kind = schema_of(table).field(name).type
    return next((f"{words} ({kind})" for is_kind, words in _TAKES if is_kind(kind)), str(kind))
