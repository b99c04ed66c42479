"""A site tapped by one kernel and by operations of torch, on any device; and what both have to agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

import insitu
from insitu.guard import Guard
from insitu.row_forms import decoded
from insitu.rules.in_force import InForce
from insitu.sites.site import Site
from insitu.slabs.harvest import add_up
from insitu.slabs.rows import Destinations
from insitu.slabs.slab import ControlBlock, Plan, Slabs
from insitu.taps.eager import Current, Full, Tap, Taps
from insitu.taps.fused import FusedTaps, fused_taps
from insitu.taps.plain import plain, rows_of, width_of

STEP, SLAB = 1 << 40, 3
DTYPES: Final = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)
LAYOUTS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "as it is": lambda x: x,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one row over and over": lambda x: x[..., :1, :].expand(x.shape) if x.ndim > 1 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "not where 16 bytes begin": lambda x: torch.cat([x.view(-1)[:1], x.view(-1)])[min(1, x.numel()) :].view(x.shape),
}
SHAPES: Final = (
    *((1, 16), (6, 16), (2, 3, 16), (4, 2, 1, 16), (7, 5), (3, 1), (9,), (), (0, 16), (1, 33), (40, 48), (2, 9000)),
)
RULES: Final = (
    insitu.Rule(sites="*"),
    insitu.Rule(sites="*", cast="bf16"),
    insitu.Rule(sites="*", cast="fp16"),
    insitu.Rule(sites="*", cast="fp8"),
    insitu.Rule(sites="*", topk=2),
)


@dataclass(frozen=True)
class Case:
    """How a tensor is tapped."""

    is_boundary: bool = True
    max_rows: int = 8
    num_valid: int = -1
    rule: insitu.Rule | None = None
    wanted: tuple[int, ...] = ()


@dataclass
class Taken:
    """What a tap left in its slab, and by which way."""

    stamp: int
    count: int
    canary: NDArray[np.float32]
    row_sum: NDArray[np.float32]
    row_absmax: NDArray[np.float32]
    rows: list[Any]
    launched: list[bool]


@dataclass
class Rig:
    """One site's tap, and what it writes."""

    device: torch.device
    case: Case
    width: int
    dtype: torch.dtype
    is_fused: bool
    launched: list[bool] = field(default_factory=list)
    """Of each call of the tap, whether a kernel took the site."""

    def __post_init__(self) -> None:
        site = Site(0, "here", "model", boundary=self.case.is_boundary)
        plan = Plan((site,), () if self.case.rule is None else (self.case.rule,), self.case.max_rows)
        self.plan, self.slabs, self.current = plan, Slabs(plan, self.device), Current()
        self.rules = InForce(plan, self.device)
        self.control = ControlBlock(self.device, plan.num_slabs)
        self.rules.learn({0: (self.width, self.dtype)})
        fused = fused_taps(plan, self.slabs, self.control) if self.is_fused else None
        if fused is not None:
            fused.prepare({0: (self.width, self.dtype)}, self.rules)
            assert fused.is_ready, "its kernels say something else than torch: see the log"
            self._watch(fused)
        assert (fused is not None) == self.is_fused, "no Triton"
        self.tap: Tap = Taps(plan, self.current, self.control.step_id, Guard("taps"), fused=fused).make(site)
        self.begin(STEP, SLAB, self.case.num_valid)

    def begin(self, step: int, slab: int, num_valid: int) -> None:
        """Open a step that is not the first."""
        current = self.current
        current.learning, current.is_fused, current.step_id = False, self.is_fused, step
        views = current.views = self.slabs.views[slab]
        current.canary, current.host_stamp = views.canary, views.host_stamp
        current.num_valid = dict.fromkeys(current.num_valid, num_valid)
        self.control.write(step, slab, num_valid, num_valid, 0, 0)
        if self.rules.row_slabs is not None:
            dest = Destinations(self.device, 1, self.case.max_rows)
            dest.aim([self.case.wanted])
            current.full = Full(self.rules.row_slabs.areas(0, {0: dest.of_group[0]}))

    def _watch(self, fused: FusedTaps) -> None:
        launch, launched = fused._launch, self.launched

        def noted(*args: Any) -> bool:
            launched.append(launch(*args))
            return launched[-1]

        fused._launch = noted  # type: ignore[method-assign, assignment]

    def read(self, slab: int = SLAB) -> Taken:
        """Return what lies in a slab now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found = self.slabs.read([slab])
        count = int(found.count[slab, 0])
        kept = slice(max(0, min(count, self.case.max_rows)))
        sums, maxima = (each[slab, :, kept].copy() for each in (found.row_sum, found.row_absmax))
        canary = found.canary[[slab]]
        if not any(self.launched[-1:]):  # taps of torch leave that of a boundary to the drain
            add_up(canary, found.row_sum[[slab]], found.count[[slab]], self.plan)
        return Taken(int(found.stamp[slab, 0]), count, canary[0, 0], sums, maxima, self._rows(), self.launched)

    def _rows(self) -> list[Any]:
        if self.rules.row_slabs is None:
            return []
        form, num = self.rules.row_slabs.forms[0], len(self.case.wanted)
        kept = self.rules.row_slabs.read(0, np.zeros(num, np.int64), np.arange(num))
        return [decoded(form.name, row.tobytes()) for row in kept]


def taken(x: torch.Tensor, case: Case, *, is_fused: bool) -> Taken:
    """Tap a tensor once, where it lies."""
    rig = Rig(x.device, case, width_of(x), x.dtype, is_fused)
    rig.tap(x)
    return rig.read()


def made(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, poison: float | None, *, is_rough: bool = False
) -> torch.Tensor:
    """Return small numbers, one of them replaced where the dtype can. is_rough: of which a cast makes others."""
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    values = values * 1.2345 if is_rough and dtype.is_floating_point else values
    if poison is not None and values.numel() and dtype.is_floating_point and dtype is not torch.float8_e4m3fn:
        values.view(-1)[seed % values.numel()] = poison
    if dtype in (torch.uint8, torch.bool):
        values = values.abs()
    return torch.complex(values, -2 * values).to(dtype) if dtype.is_complex else values.to(dtype)


def assert_same(found: Taken, expected: Taken, x: torch.Tensor, case: Case) -> None:
    """Compare all columns of the slab with those of torch's operations, and the sum with numpy's."""
    numbers = rows_of(plain(x))[: None if case.num_valid < 0 else case.num_valid].double().cpu().numpy()
    room = 1e-6 * np.abs(np.nan_to_num(numbers, posinf=0, neginf=0)).sum()
    with np.errstate(invalid="ignore"):
        told = numbers.sum()
    assert (found.stamp, found.count) == (expected.stamp, expected.count)
    assert np.allclose(found.canary, told, 1e-6, room, equal_nan=True)
    assert np.allclose(found.canary, expected.canary, 1e-6, room, equal_nan=True)
    assert np.allclose(found.row_sum, expected.row_sum, 1e-6, room, equal_nan=True)
    assert np.array_equal(found.row_absmax, expected.row_absmax, equal_nan=True)
    for (row, places), (kept, others) in zip(found.rows, expected.rows, strict=True):
        assert np.array_equal(row, kept, equal_nan=np.issubdtype(row.dtype, np.inexact))
        assert places is others is None or np.array_equal(places, others)


def is_kept_by_kernel(rule: insitu.Rule, dtype: torch.dtype) -> bool:
    """Tell whether rows of a dtype are kept by the kernel itself."""
    is_cast = dtype in (torch.float32, torch.bfloat16, torch.float16)
    of_float8 = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    if rule.topk is not None or of_float8 or dtype.is_complex:
        return False
    return rule.cast is None or not dtype.is_floating_point or (is_cast and rule.cast != "fp8")
