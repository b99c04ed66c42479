"""Fused taps on a device: what torch's operations write there, in one launch, without a wait, in a CUDA graph too.

Needs a CUDA device and Triton, which torch for CUDA brings along.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_kit import NEEDS_CUDA, launches_of, no_waiting
from fused_kit import DTYPES, LAYOUTS, RULES, SHAPES, Case, Rig, assert_same, is_kept_by_kernel, made, taken
from torch import nn

import insitu
from insitu.testing import Recording

pytestmark = NEEDS_CUDA
CALLS, ROUNDS = 20, 60


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slab_is_the_same_by_either_way(layout: str, dtype: torch.dtype) -> None:
    poisons = (None, float("inf"), float("nan"))
    for seed, shape in enumerate(SHAPES):
        for case in (Case(), Case(False), Case(max_rows=3, num_valid=4), Case(num_valid=0)):
            x = made(shape, dtype, seed, poisons[seed % 3]).cuda()
            x = LAYOUTS[layout](x) if shape else x
            found = taken(x, case, is_fused=True)
            assert_same(found, taken(x, case, is_fused=False), x, case)
            if layout == "as it is":
                assert found.launched == [True], (shape, case)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_are_the_same_by_either_way(rule: insitu.Rule) -> None:
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)):
        for shape in ((6, 16), (2, 3, 48), (7, 5), (5, 9000)):
            case = Case(seed % 2 == 0, 8, 5, rule, (4, 0, 3))
            x = made(shape, dtype, seed, float("nan"), is_rough=True).cuda()
            found = taken(x, case, is_fused=True)
            assert_same(found, taken(x, case, is_fused=False), x, case)
            assert found.launched == [is_kept_by_kernel(rule, dtype)]


@pytest.mark.parametrize("shape", [(20_000, 64), (4096, 4096), (1, 128_256), (70_000, 3)])
def test_programs_that_arrive_in_any_order_give_the_same_bits(shape: tuple[int, int]) -> None:
    case = Case(max_rows=2048)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).cuda()
    rig = Rig(x.device, case, shape[1], x.dtype, is_fused=True)
    found = []
    for _ in range(50):
        rig.tap(x)
        found.append(rig.read())
    assert_same(found[0], taken(x, case, is_fused=False), x, case)
    assert {float(each.canary) for each in found} == {float(found[0].canary)}
    assert all(np.array_equal(each.row_sum, found[0].row_sum) for each in found)


@pytest.mark.parametrize("rule", [None, insitu.Rule(sites="*", cast="bf16")])
def test_a_tap_is_one_launch(rule: insitu.Rule | None) -> None:
    case, x = Case(rule=rule, wanted=(0, 2)), torch.randn(6, 4096, device="cuda")
    fused, other = (Rig(x.device, case, 4096, x.dtype, is_fused=each) for each in (True, False))
    assert launches_of(lambda: fused.tap(x)) == ["take"]
    assert len(launches_of(lambda: other.tap(x))) >= (7 if rule else 5), "what it is compared with has become cheaper"


def test_nothing_waits_and_nothing_is_allocated() -> None:
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    rig = Rig(x.device, Case(max_rows=64, rule=insitu.Rule(sites="*"), wanted=(1,)), 4096, x.dtype, is_fused=True)
    rig.tap(x)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        for _ in range(10):
            rig.tap(x)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert rig.launched == [True] * 11


def test_a_captured_graph_writes_where_its_replay_is_told() -> None:
    given = torch.ones(4, 16, device="cuda")
    rig = Rig(given.device, Case(), 16, given.dtype, is_fused=True)
    rig.tap(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        rig.tap(given)
    assert rig.launched == [True, True]
    for step, slab, num_valid, value in ((5, 0, 4, 1.0), (6, 7, 2, 2.0), (7, 1, -1, float("nan"))):
        given.fill_(value)
        rig.control.write(step, slab, num_valid, 0, 0, 0)
        graph.replay()
    found = [rig.read(slab) for slab in (0, 7, 1)]
    assert [(each.stamp, each.count) for each in found] == [(5, 4), (6, 2), (7, 4)]
    assert np.array_equal([each.canary for each in found], [64.0, 64.0, np.nan], equal_nan=True)


def played(net: nn.Module, xs: torch.Tensor) -> tuple[Recording, str]:
    records, rules = (
        Recording(),
        [insitu.Rule(sites="*", requests="opt-in"), insitu.Rule(sites="*", take="summary", every=2)],
    )
    rows = [insitu.Rows("a", 0, 3, capture=True), insitu.Rows("b", 3, 2)]
    with torch.inference_mode(), insitu.attach(net, to=records, rules=rules, max_rows=8) as session:
        for step, x in enumerate(xs):
            with session.step(step, rows=rows, phase="decode", num_padded=2):
                net(x)
            if step % 8 == 7:
                session.flush()
        return records, session.coverage().taps


def test_a_session_records_the_same_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", "0123456789abcdef")
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 5)).eval().cuda()
    xs = torch.randn(32, 7, 16, device="cuda")
    xs[17, 4] = float("nan")
    found, path = played(copy.deepcopy(net), xs)
    monkeypatch.setenv("INSITU_FUSED_TAPS", "0")
    expected, other = played(net, xs)
    assert (path, other) == ("triton", "torch")
    for column in ("step_id", "site", "num_rows", "nonfinite_rows"):
        assert found.table("summaries")[column] == expected.table("summaries")[column], column
    for column in ("canary", "row_sum", "absmax"):
        sums, others = (np.array(each.table("summaries")[column].to_pylist(), float) for each in (found, expected))
        assert np.allclose(sums, others, 1e-5, 1e-5, equal_nan=True), column
    names = ("step_id", "site", "row", "request", "data")
    mine, theirs = (sorted([row[name] for name in names] for row in r.rows("captures")) for r in (found, expected))
    assert mine == theirs
    assert mine
    keys = {(row["step_id"], row["site"]) for row in expected.rows("statistics")}
    assert {(row["step_id"], row["site"]) for row in found.rows("statistics")} == keys
    assert keys


def test_what_the_program_has_for_its_default_dtype_and_device_changes_nothing() -> None:
    net, x, before = nn.Linear(16, 48).eval().cuda(), torch.randn(7, 16, device="cuda"), torch.get_default_dtype()
    rules, records = (
        [insitu.Rule(sites="*", requests="all"), insitu.Rule(sites="*", take="summary", every=1)],
        Recording(),
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), torch.inference_mode(), insitu.attach(net, to=records, rules=rules) as session:
            expected = [float(net(x).double().sum()) for _ in range(6)]
            assert session.coverage().taps == "triton"
    finally:
        torch.set_default_dtype(before)
    site = next(row["site"] for row in records.rows("sites") if row["name"] == "output")
    assert np.allclose([row["canary"] for row in records.rows("summaries", site=site)], expected, 1e-4, 1e-4)
    assert {row["step_id"] for row in records.rows("captures")} == set(range(1, 6))
    assert records.rows("statistics")


def cost_of(tap: Callable[[], None]) -> tuple[float, float]:
    """Return microseconds of the host and of the device that a call takes, of many in a row."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # what the device takes is then its own time
    began.record()
    since = time.perf_counter()
    for _ in range(CALLS):
        tap()
    host_s = time.perf_counter() - since
    ended.record()
    torch.cuda.synchronize()
    return 1e6 * host_s / CALLS, 1e3 * began.elapsed_time(ended) / CALLS


@pytest.mark.parametrize(
    ("shape", "is_boundary"),
    [
        *[(shape, is_boundary) for shape in ((1, 4096), (64, 4096), (2048, 4096)) for is_boundary in (False, True)],
        *[((1, 128_256), True), ((64, 128_256), True)],
    ],
)
def test_what_a_tap_costs(shape: tuple[int, int], is_boundary: bool) -> None:
    """The two ways in turns; the median ratio is the figure for docs/benchmarks.md."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    rigs = [Rig(x.device, Case(is_boundary, 2048), shape[1], x.dtype, is_fused=each) for each in (True, False)]
    for rig in rigs:
        cost_of(lambda rig=rig: rig.tap(x))  # type: ignore[misc]
    rounds = [[cost_of(lambda rig=rig: rig.tap(x)) for rig in rigs] for _ in range(ROUNDS)]  # type: ignore[misc]
    for at, what in enumerate(("host", "device")):
        mine, theirs = ([each[way][at] for each in rounds] for way in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        ours, torchs = statistics.median(mine), statistics.median(theirs)
        told = f"{ours:.1f} us fused, {torchs:.1f} us by torch, paired {ratio:.2f}"
        print(f"{list(shape)} {'boundary' if is_boundary else 'canary'}, {what}: {told}")
    if shape != (1, 128_256):  # a row is read by one program: of one row of logits nobody knows yet
        assert ratio < 1, "a kernel that takes the device longer than what it stands for is no gain"
