"""Whatever dtype and shape a module returns: the model is not disturbed, and what is told of it is true or absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import insitu
from insitu.taps.plain import bits_of, can_hold, is_plain, plain, rows_of
from insitu.testing import Recording

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool)
DTYPES = (*FLOATS, torch.float8_e8m0fnu, *COMPLEX, *INTEGERS)
SHAPES = ((), (1,), (5,), (0,), (1, 4), (6, 4), (0, 4), (3, 0), (2, 3, 4), (2, 3, 0), (2, 1, 1, 1, 1, 1, 1, 1, 1, 3))
LAYOUTS = {
    "as it is": lambda x: x,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one value over and over": lambda x: x[..., :1].expand(x.shape),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


class Returns(nn.Module):
    """Returns a tensor of its own, whatever it is given."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given = given
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.num_calls += 1
        return self.given[min(self.num_calls, len(self.given)) - 1]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return small numbers that every dtype holds exactly, of either sign where there are two."""
    values = torch.arange(int(np.prod(shape)), dtype=torch.float32).remainder(4).reshape(shape)
    if dtype is torch.float8_e8m0fnu:
        return torch.exp2(values).to(dtype)
    if dtype.is_complex:
        return torch.complex(values, -3 * values).to(dtype)
    return (values if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.bool) else 1 - values).to(dtype)


def parts(x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return x as float64 rows, by numpy alone; complex numbers as their parts."""
    if x.is_complex():
        z = x.numpy().astype(np.complex128)
        pairs = np.stack([z.real, z.imag], -1)
        return pairs.reshape(int(np.prod(x.shape[:-1])), 2 * x.shape[-1]) if x.ndim > 1 else pairs.reshape(-1, 2)
    values = x.to(torch.float64).numpy()
    if x.ndim < 2:
        return values.reshape(-1, 1)
    return values.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def told(recording: Recording, step: int = 1) -> dict[str, dict[str, Any]]:
    """Return the summaries of a step, by site."""
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    return {names[row["site"]]: row for row in recording.rows("summaries", step_id=step)}


def observe(recording: Recording, module: nn.Module, steps: int = 3, **options: Any) -> list[Any]:
    """Run a net whose middle is the module; return what the module's net gave."""
    net, x = nn.Sequential(nn.Identity(), module), torch.ones(2, 3)
    with torch.inference_mode(), insitu.attach(net, to=recording, **options) as session:
        found = [net(x) for _ in range(steps)]
        assert session.stats().dropped == {}
    return found


def assert_told(row: dict[str, Any], x: torch.Tensor) -> None:
    values = parts(x)
    assert row["canary"] == pytest.approx(values.sum(), rel=1e-6)
    assert row["num_rows"] == len(values)
    assert row["row_sum"] == pytest.approx(values.sum(), rel=1e-6)
    assert row["absmax"] == pytest.approx(np.abs(values).max(initial=0.0), rel=1e-6)
    assert row["nonfinite_rows"] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_its_sums_in_every_shape(insitu_records: Recording, dtype: torch.dtype) -> None:
    given = [numbers(shape, dtype) for shape in SHAPES]
    found = observe(insitu_records, Returns(*given), steps=len(given))
    assert all(a is b for a, b in zip(found, given, strict=True))
    for step, x in enumerate(given):  # the first one learns, the others take the short way
        assert_told(told(insitu_records, step)["output"], x)
    dtypes = {row["name"]: row["dtype"] for row in insitu_records.rows("sites")}
    assert dtypes["output"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_may_come_first(insitu_records: Recording, shape: tuple[int, ...]) -> None:
    x, other = numbers(shape, torch.float8_e5m2), numbers((3, 4), torch.float8_e5m2)
    observe(insitu_records, Returns(x, other))
    assert_told(told(insitu_records, 0)["output"], x)
    assert_told(told(insitu_records, 1)["output"], other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_strides_do_not_matter(insitu_records: Recording, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](bits_of(numbers((6, 4), torch.float32).to(dtype))).view(dtype)
    observe(insitu_records, Returns(x))
    row, values = told(insitu_records)["output"], parts(x)
    assert (row["canary"], row["row_sum"], row["absmax"]) == (values.sum(), values.sum(), np.abs(values).max())


BAD = [*((dtype, float("nan")) for dtype in (*FLOATS, torch.float8_e8m0fnu)), (torch.float8_e5m2, float("-inf"))]


@pytest.mark.parametrize(("dtype", "value"), BAD, ids=str)
def test_a_bad_value_is_seen_in_every_dtype_that_has_one(
    insitu_records: Recording, dtype: torch.dtype, value: float
) -> None:
    good, bad = numbers((3, 4), torch.float32).abs() + 1, torch.ones(3, 4)
    bad[2, 1] = value
    observe(insitu_records, Returns(good.to(dtype), good.to(dtype), bad.to(dtype)))
    assert told(insitu_records)["output"]["nonfinite_rows"] == []
    row = told(insitu_records, 2)["output"]
    assert row["nonfinite_rows"] == [2] and not np.isfinite(row["canary"])


@pytest.mark.parametrize("part", [complex(float("nan"), 1), complex(1, float("nan")), complex(0, float("inf"))])
@pytest.mark.parametrize("dtype", COMPLEX)
def test_either_part_of_a_complex_number_may_be_bad(
    insitu_records: Recording, dtype: torch.dtype, part: complex
) -> None:
    bad = numbers((3, 4), dtype)
    bad[1, 3] = torch.tensor(part)
    observe(insitu_records, Returns(numbers((3, 4), dtype), bad.conj(), bad))
    for step in (1, 2):
        row = told(insitu_records, step)["output"]
        assert row["nonfinite_rows"] == [1] and not np.isfinite(row["canary"])


def test_padding_is_left_out_in_every_shape(insitu_records: Recording) -> None:
    one, two = torch.tensor([1.0, float("nan")]), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]).to(torch.float8_e5m2)
    for x, total in ((one, 1.0), (two, 3.0)):
        recording = Recording()
        net = nn.Sequential(Returns(x))
        with torch.inference_mode(), insitu.attach(net, to=recording) as session:
            for step in range(2):
                with session.step(step, num_rows=1, num_padded=1):
                    net(torch.ones(2))
        for step in range(2):
            row = told(recording, step)["output"]
            assert (row["num_rows"], row["canary"], row["nonfinite_rows"]) == (1, total, [])


def test_rows_are_captured_bit_by_bit(insitu_records: Recording) -> None:
    for dtype in (*FLOATS, *COMPLEX, torch.int16, torch.uint16, torch.bool):
        recording = Recording()
        x = numbers((3, 4), dtype)
        observe(recording, Returns(x), rules=[insitu.Rule(sites="1", requests="all")])
        rows = recording.rows("captures", step_id=1)
        assert {row["dtype"] for row in rows} == {str(dtype).removeprefix("torch.")}
        assert b"".join(row["data"] for row in rows) == x.view(torch.uint8).numpy().tobytes()


class Both(nn.Module):
    """Calls an odd module, and returns what a usual one does."""

    def __init__(self, odd: Returns) -> None:
        super().__init__()
        self.odd, self.usual = odd, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.odd(x) is self.odd.given[0]
        found: torch.Tensor = self.usual(x)
        return found


def test_what_has_no_sums_is_absent_and_the_rest_is_told(insitu_records: Recording) -> None:
    absent = {
        "a sparse tensor": torch.eye(3).to_sparse(),
        "packed float4": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "text": "no tensor",
        "nothing": None,
        "a number": 3.5,
    }
    for what, value in absent.items():
        recording, model = Recording(), Both(Returns(value))
        rules = [insitu.Rule(sites="*", requests="all"), insitu.Rule(sites="*", take="summary", every=1)]
        with torch.inference_mode(), insitu.attach(model, to=recording, rules=rules) as session:
            for _ in range(3):
                model(torch.ones(2, 3))
            assert session.coverage().never_fired == ["odd"], what
        assert [row["canary"] for row in recording.rows("summaries")] == [6.0] * 3, what
        dtypes = {row["name"]: row["dtype"] for row in recording.rows("sites")}
        assert (dtypes["odd"] is None) == (not isinstance(value, torch.Tensor)), what


def test_an_explicit_tap_reads_any_dtype(insitu_records: Recording) -> None:
    given = {str(dtype): numbers((2, 3), dtype) for dtype in DTYPES}
    bad = torch.full((2, 3), float("nan"))

    class Tapping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name, values in given.items():
                insitu.tap(values, name)
            return bad  # so that every site is told

    net = nn.Sequential(Tapping())
    with torch.inference_mode(), insitu.attach(net, to=insitu_records):
        for _ in range(2):
            net(torch.ones(1))
    found = told(insitu_records)
    for name, values in given.items():
        assert found[name]["canary"] == pytest.approx(parts(values).sum(), rel=1e-6), name


ANY_SHAPE = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@settings(deadline=None)  # torch's own first calls are slow
@given(shape=ANY_SHAPE, dtype=st.sampled_from(DTYPES), data=st.data())
def test_plain_numbers_are_those_of_the_tensor(shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(0, 8).map(float)))
    x = torch.from_numpy(values).to(dtype)
    found = plain(x)
    assert is_plain(found) and (found is x) == is_plain(x)
    rows = rows_of(found)
    assert rows.double().numpy().tolist() == parts(x).tolist()
    assert bits_of(x).shape == x.shape or x.is_complex()
    assert can_hold(dtype)


NO_ROWS: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "packed": lambda: torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("make", NO_ROWS.values(), ids=NO_ROWS)
@pytest.mark.parametrize("rules", [(), (insitu.Rule(sites="*", requests="all"),)], ids=["", "rows"])
def test_what_has_no_rows_of_numbers_never_fires_whenever_it_is_returned(
    make: Callable[[], torch.Tensor], rules: tuple[insitu.Rule, ...]
) -> None:
    first, plain_one = make(), torch.ones(2, 3)
    for returned in ((first,), (first, plain_one), (plain_one, first, plain_one)):
        recording = Recording()
        assert observe(recording, Returns(*returned), rules=rules)[0] is returned[0]
        assert [row["step_id"] for row in recording.rows("steps")] == [0, 1, 2]
        fired = [step for step in range(3) if "output" in told(recording, step)]
        assert fired == ([0, 2] if returned[0] is plain_one else [])
