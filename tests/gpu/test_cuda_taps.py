"""Eager CUDA: the same slabs, stamps and rows as on the CPU, which is the oracle. Needs a CUDA device."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.statistics import layout as statistic_layout
from insitu.statistics.parts import finalise, from_places
from insitu.statistics.reductions import Places, compute
from insitu.statistics.workspace import Workspace
from insitu.testing import Recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


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
def test_cuda_agrees_with_the_cpu_oracle(poisoned: int | None) -> None:
    torch.manual_seed(0)
    on_host = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    on_device = copy.deepcopy(on_host).cuda()
    x = torch.randn(6, 8)
    host, device = observe(on_host, x, poisoned), observe(on_device, x.cuda(), poisoned)
    for table, column in (("summaries", "canary"), ("summaries", "absmax"), ("summaries", "row_sum")):
        expected = np.array(host.table(table)[column].to_pylist(), float)
        assert np.allclose(np.array(device.table(table)[column].to_pylist(), float), expected, 1e-4, equal_nan=True)
    assert device.table("summaries")["nonfinite_rows"] == host.table("summaries")["nonfinite_rows"]
    assert [row["request"] for row in device.rows("captures")] == [row["request"] for row in host.rows("captures")]
    for got, expected_row in zip(device.rows("captures"), host.rows("captures"), strict=True):
        assert np.allclose(np.frombuffer(got["data"], "f4"), np.frombuffer(expected_row["data"], "f4"), 1e-4)


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
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compute(given[0], places, work, step, has_scores=True, source=given[1], sourced=(1,))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(finalise(from_places(np.zeros(2, np.int64), ints.cpu().numpy(), floats.cpu().numpy())))
    host, on_device = found
    for name, values in host.items():
        assert np.allclose(on_device[name], values, 1e-5, 1e-6, equal_nan=True), name
