"""What fused taps write, by Triton's interpreter on the host, beside torch's operations and float64 numpy.

`test_fused_taps.py` runs these tests in a process of their own: whether Triton interprets is settled when it is
imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from fused_kit import DTYPES, LAYOUTS, RULES, SHAPES, Case, Rig, assert_same, is_kept_by_kernel, made, taken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import insitu
from insitu.taps import fused_kernel
from insitu.taps.fused import FusedTaps, Kernel, Need
from insitu.testing import Recording

assert os.environ["TRITON_INTERPRET"] == "1", "run by test_fused_taps.py"
pytestmark = pytest.mark.timeout(400)

HOST = torch.device("cpu")
MISSING = float("nan")


def truncated(builder: Any, source: Any, to: Any) -> Any:
    """Make bfloat16 of float32 as devices and torch do, to the nearest: the interpreter of Triton 3.7 cuts bits off."""
    if (source.dtype.scalar, to.scalar) != (triton.language.float32, triton.language.bfloat16):
        return builder.cast_impl(source, to)
    bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
    return TensorHandle(bits, to.scalar)


@pytest.fixture(autouse=True, scope="module")
def quickened() -> Iterator[None]:
    """Let a kernel be compared with torch once, however many sessions need it: the interpreter is slow."""
    known, compare = set[Any](), FusedTaps._try

    def once(self: FusedTaps, kernel: Kernel, need: Need, site: int, *, is_finite: bool) -> None:
        key = (need, is_finite, kernel.constants, id(kernel.source))
        if key not in known:
            assert compare(self, kernel, need, site, is_finite=is_finite) is None, "the interpreter compiles nothing"
            known.add(key)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FusedTaps, "_try", once)
        patched.setattr(InterpreterBuilder, "create_fp_trunc", truncated)
        yield


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.builds(Case, st.booleans(), st.sampled_from([1, 3, 8, 64]), st.integers(-1, 12)),
    st.sampled_from([None, float("inf"), -float("inf"), MISSING]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_a_slab_is_the_same_by_either_way(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, case: Case, poison: float | None, seed: int
) -> None:
    x = made(shape, dtype, seed, poison)
    x = LAYOUTS[layout](x) if shape else x
    found = taken(x, case, is_fused=True)
    assert_same(found, taken(x, case, is_fused=False), x, case)
    if layout == "as it is":
        assert found.launched == [True], "its kernel was made for it"


@given(
    st.sampled_from([shape for shape in SHAPES if len(shape) > 1]),
    st.sampled_from([dtype for dtype in DTYPES if not dtype.is_complex]),
    st.sampled_from(RULES),
    st.booleans(),
    st.lists(st.integers(0, 7), unique=True),
    st.integers(-1, 9),
    st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_rows_are_the_same_by_either_way(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rule: insitu.Rule,
    is_boundary: bool,
    wanted: list[int],
    num_valid: int,
    seed: int,
) -> None:
    if rule.topk is not None and (dtype is torch.bool or dtype.itemsize == 1):
        return  # torch has no largest of these
    x = made(shape, dtype, seed, MISSING if seed % 5 == 0 else None, is_rough=True)
    there = x.numel() // x.shape[-1]
    there = there if num_valid < 0 else min(num_valid, there)
    case = Case(is_boundary, 8, num_valid, rule, tuple(row for row in wanted if row < there))
    found = taken(x, case, is_fused=True)
    assert_same(found, taken(x, case, is_fused=False), x, case)
    assert found.launched == [is_kept_by_kernel(rule, dtype)]


@pytest.mark.parametrize("shape", [(5000, 3), (40, 16), (1, 20_000), (3, 8200)])
def test_many_programs_add_up_in_their_order(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernel, "MAX_PROGRAMS", 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    case = Case(max_rows=64)
    found, again = (taken(x, case, is_fused=True) for _ in range(2))
    assert found.launched == [True]
    assert_same(found, taken(x, case, is_fused=False), x, case)
    assert found.canary == again.canary, "not the same bits"


def test_where_a_kernel_writes_stands_in_the_control_block() -> None:
    rig = Rig(HOST, Case(), 16, torch.float32, is_fused=True)
    x = torch.ones(4, 16)
    for step, slab, num_valid in ((5, 0, 4), (6, 7, 2), (7, 1, -1)):
        rig.control.write(step, slab, num_valid, 0, 0, 0)  # and nothing else is told: a graph that is replayed
        rig.tap(x)
    found = [rig.read(slab) for slab in (0, 7, 1)]
    assert [each.stamp for each in found] == [5, 6, 7]
    assert [each.count for each in found] == [4, 2, 4]
    assert [each.canary for each in found] == [64.0, 32.0, 64.0]
    assert all(rig.read(slab).stamp < 0 for slab in (2, 3, 4, 5, 6)), "slabs that no step named"


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: None


def test_a_kernel_that_says_something_else_is_not_let_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, insitu_records: Recording
) -> None:
    monkeypatch.setattr(fused_kernel, "EVEN", Idle())
    net = nn.Linear(16, 32)
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        outputs = [net(torch.ones(2, 16)) for _ in range(3)]
        coverage = session.coverage()
    assert (coverage.taps, coverage.never_fired) == ("torch", [])
    said = [record.message for record in caplog.records if "operations of torch" in record.message]
    assert len(said) == 1
    canaries = [row["canary"] for row in insitu_records.rows("summaries")]
    assert np.allclose(canaries, [float(output.sum()) for output in outputs], 1e-5)


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16), nn.Linear(16, 5)).eval()


ASKED = (
    insitu.Rule(sites="0", requests="opt-in"),
    insitu.Rule(sites="1", rows="last", cast="bf16"),
    insitu.Rule(sites="2", topk=3),
    insitu.Rule(sites="3", cast="fp8"),
    insitu.Rule(sites="*", take="summary", every=3),
)


def played(monkeypatch: pytest.MonkeyPatch, is_fused: bool) -> tuple[Recording, str]:
    """Run a model with padding, rules and a NaN; return what was recorded, and what took it."""
    monkeypatch.setenv("INSITU_RUN", "0123456789abcdef")
    monkeypatch.setenv("INSITU_FUSED_TAPS", str(int(is_fused)))
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")
    records, net = Recording(), small_net()
    xs = torch.randn(24, 7, 16, generator=torch.Generator().manual_seed(1))
    xs[17, 4] = MISSING
    rows = [insitu.Rows("a", 0, 3, capture=True), insitu.Rows("b", 3, 2)]
    with torch.inference_mode(), insitu.attach(net, to=records, rules=ASKED, max_rows=8) as session:
        for step, x in enumerate(xs):
            if step == 12:
                session.set_rules([insitu.Rule(sites="2", rows="all"), *ASKED[1:2], *ASKED[4:]])
            with session.step(step, rows=rows, phase="decode", num_padded=2):
                net(x)
            if step % 6 == 5:
                session.flush()
        coverage = session.coverage()
    assert coverage.never_fired == []
    return records, coverage.taps


def test_a_session_records_the_same_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[bool] = []
    launch = FusedTaps._launch

    def noted(self: FusedTaps, *args: Any) -> bool:
        launched.append(launch(self, *args))
        return launched[-1]

    monkeypatch.setattr(FusedTaps, "_launch", noted)
    found, path = played(monkeypatch, is_fused=True)
    num_launched = sum(launched)
    expected, other = played(monkeypatch, is_fused=False)
    assert (path, other) == ("triton", "torch")
    assert num_launched == sum(launched) > 0.8 * len(launched), "taps that were switched off, or hardly a kernel"
    for column in ("step_id", "site", "num_rows", "nonfinite_rows"):
        assert found.table("summaries")[column] == expected.table("summaries")[column], column
    for column in ("canary", "row_sum", "absmax"):
        sums, others = (np.array(r.table("summaries")[column].to_pylist(), float) for r in (found, expected))
        assert np.allclose(sums, others, 1e-5, 1e-5, equal_nan=True), column
    assert len(found.rows("captures")) > 100
    rows, kept = (sorted(map(captured, each.rows("captures"))) for each in (found, expected))
    assert rows == kept
    mine, theirs = (sorted(map(measured, each.rows("statistics"))) for each in (found, expected))
    assert mine == theirs
    assert mine


def measured(row: dict[str, Any]) -> str:
    return str({name: value for name, value in row.items() if name not in ("epoch", "row_seq")})


def captured(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("step_id", "site", "request", "row", "position", "dtype", "data"))


class Branching(nn.Module):
    """Has a part that is rarely called."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rare = nn.Linear(16, 16), nn.Linear(16, 24)
        self.is_rare = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.often(x)
        if self.is_rare:
            self.rare(x)
        return x


def test_a_site_that_fires_late_is_learned_by_torch_and_taken_by_its_kernel_then(
    monkeypatch: pytest.MonkeyPatch, insitu_records: Recording
) -> None:
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")
    taken_sites: list[int] = []
    launch = FusedTaps._launch

    def noted(self: FusedTaps, site: int, *args: Any) -> bool:
        taken_sites.extend([site] * (is_taken := launch(self, site, *args)))
        return is_taken

    monkeypatch.setattr(FusedTaps, "_launch", noted)
    net, rules = Branching(), [insitu.Rule(sites="rare", requests="all")]
    rows = [insitu.Rows("a", 0, 3)]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules, max_rows=8) as session:
        number = next(site.number for site in session.sites() if site.name == "rare")
        for step in range(12):
            net.is_rare = step >= 4
            if step == 5:
                assert number not in taken_sites, "nobody would have learned its width"
            with session.step(step, rows=rows):
                net(torch.ones(3, 16))
            session.flush()
        assert session.coverage().never_fired == []
    assert number in taken_sites
    assert {row["step_id"] for row in insitu_records.rows("captures", site=number)} == set(range(5, 12))
