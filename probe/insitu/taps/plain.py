"""Tensors as torch can add them up. Its reductions know some dtypes only; whatever a module returns, a tap has to read.

Complex numbers become pairs of real ones side by side in their row, so that a NaN in either part is seen; float8 and
the rarer integers become float32, a copy. What torch cannot convert (packed float4) has no sums, and neither
have tensors without rows of numbers: sparse and nested ones, and those of the device `meta`.
"""

from __future__ import annotations

from typing import Final

import torch

_PLAIN: Final = frozenset(
    (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)
"""Dtypes of which torch takes sums and extremes on every device."""
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUANTISED: Final = frozenset(
    getattr(torch, name)
    for name in ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
    if hasattr(torch, name)  # torch means to drop them
)


def is_plain(x: torch.Tensor) -> bool:
    """Tell whether sums and extremes can be taken of x as it is."""
    return is_plain_dtype(x.dtype) and x.layout is torch.strided


def is_plain_dtype(dtype: torch.dtype) -> bool:
    """Tell whether `is_plain` holds for every strided tensor of a dtype."""
    return dtype in _PLAIN


def plain(x: torch.Tensor) -> torch.Tensor:
    """Return the numbers of x, in its rows, plain. Raises TypeError or RuntimeError where there are none."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        raise TypeError(f"no sums of a tensor of layout {x.layout} on {x.device}")
    if x.dtype in _PLAIN:
        return x
    if x.is_complex():
        pairs = torch.view_as_real(x.resolve_conj() if x.ndim else x.resolve_conj().reshape(1))
        return pairs.flatten(-2) if x.ndim > 1 else pairs
    return x.dequantize() if x.is_quantized else x.float()


def has_numbers(x: torch.Tensor) -> bool:
    """Tell whether x is plain, or can be made so: a tap of it has to succeed."""
    try:
        plain(x)
    except (RuntimeError, TypeError):
        return False
    return True


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as [rows, width]: leading dims flattened; a single dim is rows of one value."""
    return x.flatten(0, -2) if x.ndim > 1 else x.reshape(-1, 1)


def valid_rows(x: torch.Tensor, num_valid: int) -> torch.Tensor:
    """Return the first rows of x, so many; x itself where it has no others, or at -1."""
    return x if num_valid < 0 or x.numel() == num_valid * width_of(x) else rows_of(x)[:num_valid]


def width_of(x: torch.Tensor) -> int:
    """Return how many values a row has."""
    return x.shape[-1] if x.ndim > 1 else 1


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Return x for copying about: a dtype that `index_copy_` does not know (float8) as integers of its size."""
    return x if x.dtype in _PLAIN or x.is_complex() else x.view(_BITS[x.element_size()])


def can_hold(dtype: torch.dtype) -> bool:
    """Tell whether memory of a dtype can be made by itself: a quantised one needs its scales."""
    return dtype not in _QUANTISED
