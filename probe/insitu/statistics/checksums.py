"""A checksum of a tensor's bits that does not depend on their order: the same on all ranks that hold a tensor whole.

The sum, modulo 2^64, of f(b) = b (b + C) + K over the values, b being a value's bits as a float32. One factor of f(b) -
f(a) = (b - a)(b + a + C) is odd, and the other is smaller than 2^64, so one changed value always changes the sum.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_C: Final = (1 << 33) + 1
_K: Final = 0x1E3779B97F4A7C15
"""Odd, so that zeros are counted too."""


def checksum(value: Tensor) -> Tensor:
    """Return the checksum of a block of float32 values, int64[]; those of blocks add up."""
    bits = value.view(torch.int32).to(torch.int64)
    return (bits + _C).mul_(bits).add_(_K).sum()
