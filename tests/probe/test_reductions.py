"""The statistics of one step are what float64 numpy says they are, whatever the dtype, layout and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode
from value_kit import assert_told, part_of, read, told_by, used_places

from insitu.statistics import layout
from insitu.statistics.reductions import compute
from insitu.statistics.workspace import HOST_BLOCK, MAX_WIDTH, Workspace

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=20)
ANY = st.floats(width=32)
USUAL = st.floats(-1e3, 1e3, width=32)
FEW = st.sampled_from([0.0, -0.0, 2.0**-17, 2.0**-10, 448.0, -57344.0, 6.0, -6.0, 0.5, 1.0, float("nan"), float("inf")])


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray[Any, np.dtype[np.float32]]]:
    return hnp.arrays(np.float32, SHAPES, elements=elements)


def as_dtype(x: np.ndarray[Any, np.dtype[np.float32]], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.from_numpy(x).to(dtype)
    return torch.from_numpy(np.nan_to_num(x, posinf=1e3, neginf=-1e3).clip(-1e6, 1e6).astype(np.int64)).to(dtype)


def truth(x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return x.to(torch.float32).numpy().astype(np.float64)


@settings(deadline=None)  # torch's own first calls are slow
@given(x=st.one_of(matrices(ANY), matrices(USUAL), matrices(FEW)), dtype=st.sampled_from(DTYPES))
def test_every_dtype_is_told_as_it_is(x: np.ndarray[Any, np.dtype[np.float32]], dtype: torch.dtype) -> None:
    values = as_dtype(x, dtype)
    assert_told(read(part_of(values)), truth(values))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows of a larger tensor": lambda x: torch.cat([x, x])[: x.shape[0]],
    "one row over and over": lambda x: x[:1].expand(x.shape),
    "one value over and over": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_strides_do_not_matter(name: str, dtype: torch.dtype) -> None:
    values = as_dtype(np.random.default_rng(1).normal(0, 20, (7, 12)).astype(np.float32), dtype)
    x = LAYOUTS[name](values)
    assert_told(read(part_of(x)), truth(x.contiguous()))


@settings(deadline=None)  # torch's own first calls are slow
@given(x=st.one_of(matrices(ANY), matrices(USUAL)), size=st.integers(20, 60))
def test_blocks_add_up_to_the_whole(x: np.ndarray[Any, np.dtype[np.float32]], size: int) -> None:
    work = Workspace(torch.device("cpu"))
    work.size = size  # rows of at most 20 values: from one to all rows a block
    assert_told(read(part_of(torch.from_numpy(x), work=work)), truth(torch.from_numpy(x)))


def test_the_first_of_many_blocks_that_has_something_is_named() -> None:
    work = Workspace(torch.device("cpu"))
    work.size = 10  # two rows a block
    x = torch.ones(12, 5)
    x[5, 1], x[8, 0] = float("nan"), float("inf")
    x[6, 2] = x[9, 3] = -40.0
    x[7, 4] = x[11, 4] = 2.0**-30
    found = read(part_of(x, work=work))
    assert_told(found, truth(x))
    assert (found["first_bad_row"], found["absmax_row"], found["absmax_channel"]) in ((5, 6, 2), (5, 6, 3))


def test_a_row_wider_than_a_block_makes_room_for_itself() -> None:
    work = Workspace(torch.device("cpu"))
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(2, HOST_BLOCK + 5)).astype(np.float32))
    work.fit(x.shape[1])
    assert_told(read(part_of(x, work=work)), truth(x))


@pytest.mark.parametrize(("dtype", "limits"), [(torch.float8_e4m3fn, layout.E4M3), (torch.float8_e5m2, layout.E5M2)])
def test_a_cast_to_float8_loses_what_is_counted(dtype: torch.dtype, limits: tuple[float, float]) -> None:
    smallest, largest = limits
    kept = torch.tensor([np.nextafter(np.float32(smallest), np.float32(1)), largest])
    lost = torch.tensor([smallest, np.float32(largest) * 1.25])
    assert (kept.to(dtype).float() != 0).all() and kept.to(dtype).float()[1] == largest
    assert lost.to(dtype).float()[0] == 0 and lost.to(dtype).float()[1] != lost[1]
    name = "e4m3" if dtype is torch.float8_e4m3fn else "e5m2"
    for x, share in ((kept, 0.0), (lost, 0.5)):
        found = read(part_of(x[None]))
        assert (found[f"{name}_over_share"], found[f"{name}_under_share"]) == (share, share)


SCORES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
    elements=st.one_of(st.floats(-50, 50, width=32), st.sampled_from([float("-inf"), float("nan"), float("inf")])),
)


@settings(deadline=None)  # torch's own first calls are slow
@given(scores=SCORES)
def test_confidence_is_of_the_rows_that_have_one(scores: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    found = read(part_of(torch.from_numpy(scores), is_logits=True))
    rows = [row for row in scores.astype(np.float64) if not np.isnan(row).any() and np.isfinite(row.max())]
    if not rows:
        assert np.isnan(found["entropy"]) and np.isnan(found["logsumexp_max"])
        return
    told = []
    for row in rows:
        logsumexp = row.max() + np.log(np.exp(row - row.max()).sum())
        chance = np.sort(np.exp(row - logsumexp))[::-1]
        likely = chance[chance > 0]
        second = chance[1] if len(chance) > 1 else 0.0
        told.append(
            [-(likely * np.log(likely)).sum(), chance[0], chance[0] - second, chance[: layout.TOP_K].sum(), logsumexp]
        )
    names = layout.FIGURES[layout.SCORES][:-1]  # all but the id of the largest
    for name, values in zip(names, np.array(told).T, strict=True):
        for suffix, value in (
            ("", values.mean()),
            ("_std", values.std()),
            ("_min", values.min()),
            ("_max", values.max()),
        ):
            assert found[f"{name}{suffix}"] == pytest.approx(value, rel=1e-4, abs=2e-5), f"{name}{suffix}"
    assert np.isnan(found["residual_ratio"])


def test_a_change_of_the_residual_stream_is_by_row() -> None:
    random = np.random.default_rng(3)
    before, after = (random.normal(size=(6, 9)).astype(np.float32) for _ in range(2))
    after[2] = 3 * before[2]
    before[3] = 0.0  # has no direction
    after[4, 1] = np.nan
    found = read(part_of(torch.from_numpy(after), source=torch.from_numpy(before)))
    kept = [0, 1, 2, 5]
    long, old = (np.linalg.norm(x[kept].astype(np.float64), axis=1) for x in (after, before))
    cosine = (after[kept].astype(np.float64) * before[kept]).sum(1) / (long * old)
    assert found["residual_ratio"] == pytest.approx((long / old).mean())
    assert found["residual_cosine"] == pytest.approx(cosine.mean())
    assert found["residual_cosine_max"] == pytest.approx(1.0)
    assert np.isnan(found["entropy"])


ALIKE = st.integers(1, 4).flatmap(
    lambda num: hnp.arrays(
        np.float32,
        st.tuples(st.just(num), st.integers(1, 6), st.integers(1, 12)),
        elements=st.one_of(ANY, USUAL, FEW),
    )
)


@settings(deadline=None)  # torch's own first calls are slow
@given(x=ALIKE, scores=st.booleans(), data=st.data())
def test_sites_that_are_measured_together_are_told_as_alone(
    x: np.ndarray[Any, np.dtype[np.float32]], scores: bool, data: st.DataObject
) -> None:
    values = torch.from_numpy(x)
    sourced = sorted(data.draw(st.sets(st.integers(0, len(x) - 1))))
    sources = torch.flip(values, (1,))[sourced] + 1
    given: dict[str, Any] = {"source": sources, "sourced": sourced} if sourced else {}
    together = told_by(values, has_scores=scores, **given)
    for site, each in enumerate(values):
        source = sources[sourced.index(site)] if site in sourced else None
        alone = read(part_of(each, is_logits=scores, source=source))
        found = read(together, site)
        for name, value in alone.items():  # the sample of casts is of all that are measured together
            if not name.startswith(layout.CASTS):
                rounding = 1e-6 + 1e-12 * each.numel() * float(truth(each)[np.isfinite(truth(each))].max(initial=0.0))
                assert found[name] == pytest.approx(value, rel=1e-6, abs=rounding, nan_ok=True), name
        assert_told(found, truth(each))


def test_a_row_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16777216"):
        Workspace(torch.device("cpu")).fit(MAX_WIDTH + 1)


def test_one_id_for_all_rows_shows_and_a_router_has_a_loss() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0], [2.0, 5.0, 1.0], [0.0, float("nan"), 9.0]])
    found = read(part_of(scores, is_logits=True))
    assert (found["top_id_min"], found["top_id_max"]) == (1.0, 1.0)
    logsumexp = np.log(np.exp(scores[:2].numpy()).sum(1))
    assert found["z_loss"] == pytest.approx((logsumexp**2).mean(), rel=1e-6)
    other = read(part_of(torch.eye(4), is_logits=True))
    assert (other["top_id_min"], other["top_id_max"]) == (0.0, 3.0)
    assert np.isnan(read(part_of(scores))["top_id_min"]) and np.isnan(read(part_of(scores))["z_loss"])


def test_complex_numbers_have_no_statistics() -> None:
    with pytest.raises(TypeError, match="complex64"):
        part_of(torch.zeros(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("is_logits", [False, True])
def test_it_traces_into_a_graph_without_a_break_and_says_the_same(rows: int, is_logits: bool) -> None:
    torch.manual_seed(4)
    x, work = torch.randn(1, rows, 24), Workspace(torch.device("cpu"))
    work.size = 4 * 24  # nine rows are three blocks
    places, stamp = used_places(1), torch.tensor(4)

    def step(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x) * 2
        compute(y, places, work, stamp, has_scores=is_logits, source=x, sourced=(0,))
        return y

    step(x)
    expected = places.ints.clone(), places.floats.clone()
    places.ints.fill_(-5)
    places.floats.fill_(-5.0)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(places.ints[:, : layout.CHECKSUM], expected[0][:, : layout.CHECKSUM])
    assert torch.allclose(places.floats, expected[1], equal_nan=True)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest memory that any operation made."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, list | tuple) else [found]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.num_bytes = max(self.num_bytes, each.untyped_storage().nbytes())
        return found


def test_memory_is_bounded_by_the_block_whatever_the_tensor() -> None:
    work = Workspace(torch.device("cpu"))
    x = torch.randn(4096, 256)
    places = used_places(1)
    memory = [x, places.ints, places.floats, *(each for each in vars(work).values() if isinstance(each, torch.Tensor))]
    with Largest({each.untyped_storage().data_ptr() for each in memory}) as largest:
        compute(x[None], places, work, torch.tensor(0))
    assert 0 < largest.num_bytes <= 4 * work.size < x.untyped_storage().nbytes() / 4
