"""Eager CUDA: the same slabs, stamps and rows as on the CPU, which is the oracle. Needs a CUDA device."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cuda_kit import NEEDS_CUDA, no_waiting
from torch import nn

import insitu
from insitu.statistics import layout as statistic_layout
from insitu.statistics.parts import finalise, from_places
from insitu.statistics.reductions import Places, compute
from insitu.statistics.workspace import Workspace
from insitu.testing import Recording

pytestmark = NEEDS_CUDA


def observe(net: nn.Module, x: torch.Tensor, poisoned: int | None) -> Recording:
    recording = Recording()
    rules = [insitu.Rule(sites="*", requests="opt-in")]
    rows = [insitu.Rows("a", start=0, count=3, position=5, capture=True), insitu.Rows("b", start=3, count=2)]
    with torch.inference_mode(), insitu.attach(net, to=recording, rules=rules, max_rows=16) as session:
        for step in range(12):
            y = x.clone()
            if step == poisoned:
                y[4] = float("nan")
            with session.step(step, rows=rows, phase="decode", num_padded=1):
                net(y)
    return recording


@pytest.mark.parametrize("poisoned", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cuda_agrees_with_the_cpu_oracle(dtype: torch.dtype, poisoned: int | None) -> None:
    torch.manual_seed(0)
    on_host = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype)
    on_device = copy.deepcopy(on_host).cuda()
    x = torch.randn(6, 8, dtype=dtype)
    host, device = observe(on_host, x, poisoned), observe(on_device, x.cuda(), poisoned)
    for column in ("step_id", "site", "num_rows", "nonfinite_rows"):
        assert device.table("summaries")[column] == host.table("summaries")[column], column
    for column in ("canary", "absmax", "row_sum"):
        found, expected = (np.array(each.table("summaries")[column].to_pylist(), float) for each in (device, host))
        assert np.allclose(found, expected, 1e-4, 1e-5, equal_nan=True), column
    names, kind = ("step_id", "site", "row", "request"), "f8" if dtype is torch.float64 else "f4"
    rows, oracle = (
        sorted(([row[name] for name in names], row["data"]) for row in each.rows("captures")) for each in (device, host)
    )
    assert [key for key, _ in rows] == [key for key, _ in oracle]
    assert rows
    for (_, got), (_, data) in zip(rows, oracle, strict=True):
        assert np.allclose(np.frombuffer(got, kind), np.frombuffer(data, kind), 1e-4, 1e-5, equal_nan=True)


def test_each_step_is_itself_however_far_the_host_is_ahead() -> None:
    """The device is held up while the host runs a hundred steps: what tells it which they are must still be there."""
    records, net, num_steps = Recording(), nn.Linear(8, 4).eval().cuda(), 100
    xs = [torch.full((3, 8), float(step), device="cuda") for step in range(num_steps)]
    rules = [insitu.Rule(sites="output", requests="opt-in")]
    rows = [[insitu.Rows("a", 0, 3, capture=step % 2 == 1)] for step in range(num_steps)]
    with torch.inference_mode(), insitu.attach(net, to=records, rules=rules, max_rows=8) as session:
        for step, x in enumerate(xs):
            if step == 2:  # what is compiled or allocated at first, is
                torch.cuda.synchronize()
                torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
            with session.step(step, rows=rows[step]):
                net(x)
    with torch.inference_mode():
        expected = [float(net(x).sum()) for x in xs]
    told = records.rows("summaries")
    assert [row["step_id"] for row in told] == list(range(num_steps))
    assert np.allclose([row["canary"] for row in told], expected, 1e-4, 1e-4)
    assert {row["step_id"] for row in records.rows("captures")} == set(range(1, num_steps, 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device on this machine")
def test_a_model_on_a_device_that_is_not_the_threads_is_seen() -> None:
    records, net = Recording(), nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval().to("cuda:1")
    x, before = torch.randn(4, 16, device="cuda:1"), torch.cuda.current_device()
    with torch.inference_mode(), insitu.attach(net, to=records) as session:
        expected = [float(net(x).sum()) for _ in range(30)]
        assert session.coverage().never_fired == []
    assert before == torch.cuda.current_device() != 1
    output = next(row["site"] for row in records.rows("sites") if row["name"] == "output")
    told = [row["canary"] for row in records.rows("summaries", site=output)]
    assert np.allclose(told, expected, 1e-4, 1e-4)


def test_outputs_are_bit_identical_attached_and_detached() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda().half()
    x = torch.randn(32, 64, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        before = net(x)
        with insitu.attach(net, to=Recording()):
            during = [net(x) for _ in range(50)]
        assert all(torch.equal(before, output) for output in [*during, net(x)])


def test_statistics_of_the_device_are_those_of_the_host_and_nothing_waits_for_it() -> None:
    torch.manual_seed(1)
    x, source = torch.randn(300, 70), torch.randn(300, 70)
    x[7, 3], x[200, 0], x[5, 9] = float("nan"), float("inf"), 300.0
    found = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        ints = torch.zeros(2, statistic_layout.NUM_INTS, dtype=torch.int64, device=device)
        floats = torch.zeros(2, statistic_layout.NUM_FLOATS, dtype=torch.float64, device=device)
        given, work = (torch.stack([x, -x]).to(device), source[None].to(device)), Workspace(device)
        places, step = Places(ints, floats, torch.arange(2, device=device)), torch.tensor(3, device=device)
        with no_waiting():
            compute(given[0], places, work, step, has_scores=True, source=given[1], sourced=(1,))
        found.append(finalise(from_places(np.zeros(2, np.int64), ints.cpu().numpy(), floats.cpu().numpy())))
    host, on_device = found
    for name, values in host.items():
        assert np.allclose(on_device[name], values, 1e-5, 1e-6, equal_nan=True), name


def test_sites_that_lie_unevenly_are_measured_without_a_wait() -> None:
    """Of residual streams what their layers read comes along, at sites that may be any of those measured together."""
    torch.manual_seed(2)
    x, source, found = torch.randn(4, 6, 16), torch.randn(3, 6, 16), []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        ints = torch.zeros(4, statistic_layout.NUM_INTS, dtype=torch.int64, device=device)
        floats = torch.zeros(4, statistic_layout.NUM_FLOATS, dtype=torch.float64, device=device)
        places, step = Places(ints, floats, torch.arange(4, device=device)), torch.tensor(3, device=device)
        given, read, work = x.to(device), source.to(device), Workspace(device)
        for is_first in (True, False):  # the first time tells the device which sites they are
            with nullcontext() if is_first else no_waiting():
                compute(given, places, work, step, source=read, sourced=(0, 1, 3))
        found.append(finalise(from_places(np.zeros(4, np.int64), ints.cpu().numpy(), floats.cpu().numpy())))
    host, on_device = found
    for name, values in host.items():
        assert np.allclose(on_device[name], values, 1e-5, 1e-6, equal_nan=True), name
