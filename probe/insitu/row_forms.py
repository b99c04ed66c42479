"""How the rows of a site are kept: as they are, cast to a smaller type, or the largest values of each. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from insitu.rules.rule import CASTS

if TYPE_CHECKING:
    from insitu.rules.rule import Rule

INDEX: Final = "int32"
"""Type of a value's place in its row, where only the largest are kept."""
_INDEX_BYTES: Final = 4
ITEM_BYTES: Final = {
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")},
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": 1,
}
"""Bytes of a value, by torch's name of the type. Rows of other types are not kept."""


_WITHOUT_NUMPY: Final = ("complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@dataclass(frozen=True, slots=True)
class RowForm:
    """What is kept of a row: so many values of a type, and their places where they are not the whole row."""

    width: int
    dtype: str
    """Torch's name."""
    is_top: bool = False
    """Only the largest values are kept, the largest first."""

    @property
    def name(self) -> str:
        """What `captures.dtype` says: `bfloat16+int32` where places follow the values."""
        return f"{self.dtype}+{INDEX}" if self.is_top else self.dtype

    @property
    def num_bytes(self) -> int:
        return self.width * (ITEM_BYTES[self.dtype] + (_INDEX_BYTES if self.is_top else 0))


def form_of(rule: Rule, width: int, dtype: str) -> RowForm:
    """Return how a rule keeps rows of `width` values of a type. Integers are what they are: a cast is for floats."""
    is_float = dtype.startswith(("float", "bfloat"))
    kept = CASTS[rule.cast] if rule.cast is not None and is_float else dtype
    return RowForm(width if rule.topk is None else min(rule.topk, width), kept, rule.topk is not None)


def decoded(dtype: str, data: bytes) -> tuple[NDArray[Any], NDArray[np.int32] | None]:
    """Return what a row of `captures` holds: its values, and their places in the row or None where all are there.

    bfloat16, float8_e4m3fn and float8_e5m2 come as float32, which holds each of them exactly. Raises ValueError for a
    type that numpy has nothing for.
    """
    name, _, index = dtype.partition("+")
    if name not in ITEM_BYTES or name in _WITHOUT_NUMPY or index not in ("", INDEX):
        known = ", ".join(kind for kind in ITEM_BYTES if kind not in _WITHOUT_NUMPY)
        raise ValueError(f"rows of type {dtype!r} cannot be read here; the types are {known}")
    if not index:
        return _values(name, data), None
    split = len(data) - len(data) // (ITEM_BYTES[name] + _INDEX_BYTES) * _INDEX_BYTES
    return _values(name, data[:split]), np.frombuffer(data[split:], np.int32)


def _values(name: str, data: bytes) -> NDArray[Any]:
    if name == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if name == "float8_e4m3fn":
        return _E4M3[np.frombuffer(data, np.uint8)]
    if name == "float8_e5m2":  # the upper half of a float16
        return (np.frombuffer(data, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return np.frombuffer(data, np.dtype(name))


def _e4m3_values() -> NDArray[np.float32]:
    """Return the value of each byte: a sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(byte & 127) == 127] = np.nan
    return np.where(byte > 127, -size, size).astype(np.float32)


_E4M3: Final = _e4m3_values()
