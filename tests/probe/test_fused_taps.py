"""Fused taps where no GPU is: their kernels interpreted, compiled for devices that are not here, and chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.sites.site import Site
from insitu.slabs.graph import NUM_ROWS, NUM_SAMPLES
from insitu.slabs.slab import ControlBlock, Plan, Slabs
from insitu.taps.fused import fused_taps
from insitu.taps.fused_layout import row_strides, table_of
from insitu.taps.plain import rows_of
from insitu.testing import Recording

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton: it comes for Linux on x86-64")


def run_python(*arguments: str, **environment: str) -> str:
    """Run Python in a process of its own; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("INSITU_", "PYTEST_"))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@needs_triton
@pytest.mark.timeout(600)
def test_kernels_write_what_torch_writes_by_the_interpreter() -> None:
    tests = str(HERE / "interpreted_fused.py")
    printed = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1")
    assert " passed" in printed and " skipped" not in printed, printed


@needs_triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_devices_that_are_not_here(capability: int) -> None:
    found = json.loads(run_python(str(HERE / "compiled_fused.py"), str(capability)))
    for name, ptx in found.items():
        assert ptx["entries"] == 1, name
        assert ptx["float_atomics"] == 0, "sums would depend on who comes first"
        assert ptx["ordered_arrivals"] == 1, name
        assert ptx["wide_loads"] > 0 or name.startswith("odd"), "rows are read a value at a time"


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Return a tensor whose dims are in any order, some of them with gaps."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    every = [draw(st.integers(1, 3)) for _ in lengths]
    order = draw(st.permutations(range(len(lengths))))
    whole = torch.Size([length * step for length, step in zip(lengths, every, strict=True)])
    x = torch.arange(whole.numel()).reshape(whole)
    return x[tuple(slice(None, None, step) for step in every)].permute(order)


@given(tensors())
def test_rows_lie_as_torch_lays_them(x: torch.Tensor) -> None:
    found, rows = row_strides(x.shape, x.stride()), rows_of(x)
    try:
        x.view(rows.shape)
    except RuntimeError:
        assert found is None or x.ndim < 2
    else:
        assert found is not None or not x.numel()
    if found is not None:
        assert torch.equal(torch.as_strided(x, rows.shape, found), rows)


def test_the_table_says_where_the_views_of_a_slab_are() -> None:
    sites = tuple(
        Site(number, f"s{number}", "m", axis=axis, boundary=number in (1, 3))
        for number, axis in enumerate(("tokens", "samples", "batch", "tokens"))
    )
    plan = Plan(sites, (), 24)
    slabs = Slabs(plan, torch.device("cpu"))
    for slab, views in enumerate(slabs.views[:3]):
        for site, row in enumerate(table_of(plan)):
            axis, stamp, count, canary, row_sum, row_absmax, words, max_rows = row
            begin = slabs.memory.data_ptr() + 8 * words * slab
            assert views.stamp[site].data_ptr() == begin + 8 * stamp
            assert views.count[site].data_ptr() == begin + 8 * count
            assert views.canary[site].data_ptr() == begin + 4 * canary
            if site in views.row_sum:
                assert views.row_sum[site].data_ptr() == begin + 4 * row_sum
                assert views.row_absmax[site].data_ptr() == begin + 4 * row_absmax
            assert (axis, max_rows) == (NUM_SAMPLES if site == 1 else NUM_ROWS, 24)


def test_on_a_host_taps_are_operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan, host = Plan((Site(0, "s", "m"),), (), 8), torch.device("cpu")
    assert fused_taps(plan, Slabs(plan, host), ControlBlock(host)) is None
    net, records = nn.Linear(4, 4), Recording()
    with insitu.attach(net, to=records) as session, torch.inference_mode():
        net(torch.ones(2, 4))
        assert session.coverage().taps == "torch"
