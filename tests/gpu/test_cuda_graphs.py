"""CUDA graphs, of the compiler and hand-made: each replay is the step it runs in. Needs a CUDA device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_kit import NEEDS_CUDA, launches_of
from torch import nn
from torch._dynamo.utils import counters

import insitu
from insitu.testing import Recording

pytestmark = NEEDS_CUDA


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


class Turned(nn.Module):
    """Gives its rows back in a tensor in which they do not lie evenly: no kernel reads those."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 2, -1).transpose(0, 1)


def turned_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), Turned(), nn.Linear(32, 8)).eval()


def on_the_host(xs: list[torch.Tensor], make: Callable[[], nn.Module] = small_net) -> Recording:
    recording, net = Recording(), make()
    with torch.inference_mode(), insitu.attach(net, to=recording) as session:
        for step, x in enumerate(xs):
            net(x)
            if step % 60 == 59:
                session.flush()
    return recording


def assert_same(found: Recording, expected: Recording) -> None:
    for column in ("step_id", "site", "num_rows", "nonfinite_rows"):
        assert found.table("summaries")[column] == expected.table("summaries")[column], column
    for column in ("canary", "row_sum", "absmax"):
        got, told = (np.array(r.table("summaries")[column].to_pylist(), float) for r in (found, expected))
        assert np.allclose(got, told, 1e-4, 1e-4, equal_nan=True), column


def test_reduce_overhead_says_what_the_host_says_and_its_graphs_are_used(insitu_records: Recording) -> None:
    xs = [torch.randn(4, 16) for _ in range(600)]  # around the ring more than twice
    xs[300][2, 5] = math.nan
    net = small_net().cuda()
    counters.clear()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
        for step, x in enumerate(xs):
            compiled(x.cuda())
            if step % 60 == 59:
                session.flush()
    assert not counters["inductor"]["cudagraph_skips"], "taps keep the compiler from making CUDA graphs"
    assert_same(insitu_records, on_the_host(xs))


def test_reduce_overhead_takes_the_rows_that_are_wanted(insitu_records: Recording) -> None:
    net = small_net().cuda()
    rules = [insitu.Rule(sites="*", requests="opt-in")]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules, max_rows=8) as session:
        compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
        for step in range(60):
            x = torch.full((4, 16), float(step), device="cuda")
            with session.step(step, rows=[insitu.Rows("a", 0, 3, capture=step % 3 == 1)], num_padded=1):
                expected = compiled(x)[:3].cpu().numpy()
            if step == 58:
                last = expected
    site = next(row["site"] for row in insitu_records.rows("sites") if row["name"] == "2")
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {step for step in range(60) if step % 3 == 1}
    rows = insitu_records.rows("captures", step_id=58, site=site)
    assert np.array_equal(np.stack([np.frombuffer(row["data"], np.float32) for row in rows]), last)


def test_models_of_one_class_whose_slabs_have_other_sizes_are_compiled_in_one_process() -> None:
    x = torch.ones(4, 16, device="cuda")
    for max_rows in (2048, 8, 64):
        records, net = Recording(), small_net().cuda()
        with torch.inference_mode(), insitu.attach(net, to=records, max_rows=max_rows):
            compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
            expected = [float(compiled(x).sum()) for _ in range(6)]
        site = next(row["site"] for row in records.rows("sites") if row["name"] == "output")
        told = [row["canary"] for row in records.rows("summaries", site=site)]
        assert np.allclose(told, expected, 1e-4, 1e-4), max_rows


def captured(net: nn.Module, like: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a CUDA graph of one forward, its input and its output."""
    x = like.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        net(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = net(x)
    return graph, x, output


@pytest.mark.parametrize("make", [small_net, turned_net])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_each_replay_of_a_hand_made_graph_is_the_step_it_runs_in(
    by_kernels: bool, make: Callable[[], nn.Module], insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_FUSED_TAPS", str(int(by_kernels)))
    xs = [torch.randn(4, 16) for _ in range(600)]
    xs[400][1, 3] = math.nan
    net = make().cuda()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        graph, given, _ = captured(net, xs[0].cuda())  # the forward that warms up is step 0
        session.flush()
        for step, x in enumerate(xs[1:], 1):
            given.copy_(x)
            with session.step(step):
                graph.replay()
            given.fill_(math.nan)
            graph.replay()  # of no step: to be seen nowhere
            if step % 60 == 59:
                session.flush()
    assert_same(insitu_records, on_the_host(xs, make))


def test_padding_of_a_replay_is_that_of_its_step(insitu_records: Recording) -> None:
    net, x = small_net().cuda(), torch.ones(4, 16, device="cuda")
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        graph, given, _ = captured(net, x)
        given.copy_(x)
        given[2:] = math.nan
        for num_padded in (2, 3, 1):
            with session.step(rows=[insitu.Rows("a", 0, 4 - num_padded)], num_padded=num_padded):
                graph.replay()
    told = [row for row in insitu_records.rows("summaries") if row["num_rows"] is not None]
    found = {(row["step_id"], row["num_rows"], math.isnan(row["canary"])) for row in told}
    assert found == {(0, 4, False), (1, 2, False), (2, 1, False), (3, 3, True)}, "whichever boundary"


def test_a_hand_made_graph_holds_a_kernel_a_site() -> None:
    net, bare, x = small_net().cuda(), small_net().cuda(), torch.randn(4, 16, device="cuda")
    with torch.inference_mode(), insitu.attach(net, to=Recording()) as session:
        (graph, *_), (other, *_) = captured(net, x), captured(bare, x)
        assert session.coverage().taps == "triton"
        taps = launches_of(graph.replay)
        for name in launches_of(other.replay):
            taps.remove(name)
    num_sites = 4  # three modules, and what the model returns
    assert taps.count("take") == num_sites
    assert len(taps) <= num_sites + 3, "beside kernels, a graph holds what tells how many rows are valid"


def test_a_hand_made_graph_returns_the_same_bits_with_taps_and_without() -> None:
    x, bare = torch.randn(4, 16, device="cuda"), small_net().cuda()
    net = copy.deepcopy(bare)
    with torch.inference_mode(), insitu.attach(net, to=Recording()):
        outputs = []
        for each in (bare, net):
            graph, given, output = captured(each, x)
            given.copy_(x)
            graph.replay()
            outputs.append(output.clone())
    assert torch.equal(*outputs)
