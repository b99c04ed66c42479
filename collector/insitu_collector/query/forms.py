"""Bytes of captured rows as arrays: of numpy, or of torch where it is installed, which has every type."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from insitu.row_forms import INDEX, ITEM_BYTES, decoded

Bytes = NDArray[np.uint8]
_INDEX_BYTES: Final = 4
NATIVE: Final = frozenset(
    (
        *("complex128", "complex64", "float64", "float32", "float16", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
)
"""Types that numpy has; bfloat16 and float8 become float32, which holds each of their values."""


def item_bytes(dtype: str) -> int:
    """Return the bytes of one value kept, with its place where that follows. Raises ValueError for an unknown type."""
    name, _, index = dtype.partition("+")
    if name not in ITEM_BYTES or index not in ("", INDEX):
        raise ValueError(f"rows of type {dtype!r} cannot be read here; the types are {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[name] + (_INDEX_BYTES if index else 0)


def split(dtype: str, rows: Bytes) -> tuple[str, Bytes, NDArray[np.int32] | None]:
    """Return type and bytes of the values of rows [n, bytes], and their places [n, k] where those are kept too."""
    name, _, index = dtype.partition("+")
    if not index:
        return name, rows, None
    width = rows.shape[1] // item_bytes(dtype) * ITEM_BYTES[name]
    places = np.ascontiguousarray(rows[:, width:]).view(np.int32)
    return name, np.ascontiguousarray(rows[:, :width]), places


def array_of(dtype: str, rows: Bytes, *, torch: bool) -> Any:
    """Return the values of rows [n, bytes] as [n, width]: the same memory where the type is one of theirs.

    Raises ValueError for a type that numpy has nothing for, ModuleNotFoundError where torch is asked for and missing.
    """
    if torch:
        return _torch(dtype, rows)
    if dtype in NATIVE:
        return _aligned(rows, ITEM_BYTES[dtype]).view(np.dtype(dtype))
    return decoded(dtype, rows.tobytes())[0].reshape(len(rows), -1)


def _torch(dtype: str, rows: Bytes) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        line = "torch=True needs torch, which is not installed; leave it out, and bfloat16 comes as float32 of numpy"
        raise ModuleNotFoundError(line, name=error.name) from None
    kind = getattr(torch, dtype)
    rows = _aligned(rows, ITEM_BYTES[dtype])
    if not rows.flags.writeable:
        rows = rows.copy()
    return torch.from_numpy(rows).view(kind)


def _aligned(rows: Bytes, num_bytes: int) -> Bytes:
    """Return the rows where their values can be read in place; a copy where they do not lie so."""
    return rows if rows.flags.c_contiguous and rows.ctypes.data % num_bytes == 0 else np.array(rows, copy=True)
