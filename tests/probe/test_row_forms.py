"""Rows are kept in the form a rule asks for, and read back without torch as torch has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from insitu.row_forms import ITEM_BYTES, RowForm, decoded, form_of
from insitu.rules.rule import Rule


def raw(x: torch.Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "name", ["float64", "float32", "bfloat16", "float16", "int64", "uint16", "uint8", "bool", "complex64"]
)
def test_values_are_those_that_torch_has(name: str) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0]).to(getattr(torch, name))
    values, places = decoded(name, raw(x))
    assert places is None
    assert values.tolist() == x.tolist()


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_each_byte_of_a_float8_is_what_torch_makes_of_it(name: str) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.view(getattr(torch, name)).float().numpy()
    assert np.array_equal(decoded(name, raw(every))[0], expected, equal_nan=True)


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_a_value_has_the_bytes_that_torch_gives_it(name: str) -> None:
    assert getattr(torch, name).itemsize == ITEM_BYTES[name]


def test_the_largest_values_come_with_their_places() -> None:
    values, places = torch.topk(torch.tensor([3.0, -1.0, 9.5, 0.0]).to(torch.bfloat16), 2)
    found, at = decoded("bfloat16+int32", raw(values) + raw(places.to(torch.int32)))
    assert at is not None
    assert (found.tolist(), at.tolist()) == ([9.5, 3.0], [2, 0])


def test_an_unknown_type_is_an_error() -> None:
    for dtype in ("float4", "bfloat16+int8", "complex32"):
        with pytest.raises(ValueError, match="cannot be read here; the types are "):
            decoded(dtype, b"")


@pytest.mark.parametrize(
    ("fields", "dtype", "form"),
    [
        ({}, "float32", RowForm(8, "float32")),
        ({"cast": "bf16"}, "float32", RowForm(8, "bfloat16")),
        ({"cast": "fp8"}, "bfloat16", RowForm(8, "float8_e4m3fn")),
        ({"cast": "fp16"}, "int64", RowForm(8, "int64")),
        ({"topk": 3, "cast": "bf16"}, "float32", RowForm(3, "bfloat16", True)),
        ({"topk": 99}, "float32", RowForm(8, "float32", True)),
    ],
)
def test_a_rule_says_the_form(fields: dict[str, object], dtype: str, form: RowForm) -> None:
    assert form_of(Rule(sites="*", **fields), 8, dtype) == form  # type: ignore[arg-type]


def test_bytes_of_a_row() -> None:
    assert [RowForm(8, "float32").num_bytes, RowForm(64, "bfloat16", True).num_bytes] == [32, 64 * 6]
