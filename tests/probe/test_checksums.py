"""A checksum of bits does not depend on their order, and depends on every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from insitu.statistics.checksums import _C, _K, checksum

Float32 = np.ndarray[Any, np.dtype[np.float32]]
BITS = hnp.arrays(np.int32, hnp.array_shapes(max_dims=2, max_side=30))


def of(bits: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    return int(checksum(torch.from_numpy(bits).view(torch.float32)))


@settings(deadline=None)  # torch's own first calls are slow
@given(bits=BITS, data=st.data())
def test_it_is_the_sum_of_its_formula_in_any_order_and_in_parts(
    bits: np.ndarray[Any, np.dtype[np.int32]], data: st.DataObject
) -> None:
    exact = sum(b * (b + _C) + _K for b in bits.reshape(-1).tolist())
    found = of(bits)
    assert found % 2**64 == exact % 2**64
    order = np.array(data.draw(st.permutations(range(bits.size))), np.int64)
    mixed = bits.reshape(-1)[order]
    cut = data.draw(st.integers(0, bits.size))
    assert of(mixed) == found
    assert (of(mixed[:cut]) + of(mixed[cut:]) - found) % 2**64 == 0


@settings(deadline=None)
@given(bits=BITS, data=st.data())
def test_another_value_anywhere_is_another_checksum(
    bits: np.ndarray[Any, np.dtype[np.int32]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, bits.size - 1))
    other = bits.copy().reshape(-1)
    other[at] = data.draw(st.integers(-(2**31), 2**31 - 1))
    assume(other[at] != bits.reshape(-1)[at])
    assert of(other) != of(bits)


def test_zeros_count() -> None:
    assert len({of(np.zeros(n, np.int32)) for n in range(5)}) == 5
