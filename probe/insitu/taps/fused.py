"""Taps of one launch: what `insitu.taps` takes by two to seven operations of torch, taken by one kernel a site.

Chosen when a model is attached: where it lies on CUDA and Triton can be imported. When the first step has shown what
its sites return, each kernel they need is compiled, run on tensors of ours and compared with what torch says; from the
next step on taps launch it. Until then, and where a tensor is not what its site's kernel was made for, torch's
operations take the site, into the same places.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from insitu.slabs.slab import ControlBlock, Plan, Slabs
from insitu.taps.fused_layout import row_strides, table_of
from insitu.taps.plain import plain, valid_rows, width_of

if TYPE_CHECKING:
    from insitu.row_forms import RowForm
    from insitu.rules.in_force import InForce, Shapes
    from insitu.sites.site import Site
    from insitu.slabs.rows import RowArea
    from insitu.taps.eager import Current, Full, Tap
    from insitu.taps.graph import Desk

logger = logging.getLogger("insitu")

TRITON, TORCH = "triton", "torch"
"""What takes sites: one kernel, or operations of torch."""
_TILE: Final = 2048
"""Values that a program reads at once: sixteen for each of its threads."""
_MAX_COLUMNS: Final = 8192
"""And of a row that is wider than a tile, so that a row of logits has more than one read on its way."""
_MISALIGNED: Final = 15
_CASTS: Final = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""Types between which rows are cast on their way."""
_LOADED: Final = _CASTS | {
    *(torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Types that a kernel reads. Others (float8, complex numbers) are made plain first, which is a copy, as in any tap."""
_WIDEST: Final = 1 << 24
_FURTHEST: Final = (1 << 31) - 1
_TENSORS: Final = (Tensor, nn.Parameter)
_TRIED_ROWS, _TRIED_VALID, _TRIED_STEP = 7, 5, 77

Need = tuple[torch.dtype, torch.dtype | None, int, bool]
"""What a kernel is made for: type, type of the rows that are kept (None: none are), width, whether at a boundary."""


class Memory(NamedTuple):
    """What a kernel writes, and what tells it where: its arguments of those names."""

    control: Tensor
    table: Tensor
    words: Tensor
    floats: Tensor
    partial: Tensor
    arrived: Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is made for one `Need`."""

    source: Any
    """What Triton compiles at its first launch."""
    constants: tuple[Any, ...]
    """Its last arguments."""
    num_warps: int
    block_rows: int
    is_even: bool
    """Whether it reads rows 16 bytes at a time."""
    compiled: Any = None
    """What came of it. Launched as such, since Triton otherwise asks at each launch whether there is one that fits."""


def kept_as(form: RowForm | None, dtype: torch.dtype) -> torch.dtype | None:
    """Return as what a kernel keeps rows of a dtype; None where it keeps none, or not in that form."""
    if form is None or form.is_top or dtype not in _LOADED:
        return None
    kept: torch.dtype = getattr(torch, form.dtype)
    return kept if kept is dtype or {kept, dtype} <= _CASTS else None


def fused_taps(plan: Plan, slabs: Slabs, control: ControlBlock) -> FusedTaps | None:
    """Return the fused taps of a model; None where no kernel can run. On a host only Triton's interpreter runs them."""
    if slabs.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from insitu.taps import fused_kernel
    except Exception as error:  # there is no Triton, or one that does not fit: whatever it raises
        logger.info("insitu: taps are operations of torch: no Triton (%s: %s)", type(error).__name__, error)
        return None
    return FusedTaps(plan, slabs, control, fused_kernel)


class FusedTaps:
    """The kernels of one model. `prepare` runs on any thread, the rest on that of the step."""

    def __init__(self, plan: Plan, slabs: Slabs, control: ControlBlock, source: Any) -> None:
        """source: the module `insitu.taps.fused_kernel`."""
        self._plan, self._device, self._source = plan, slabs.device, source
        self._kernels: dict[Need, Kernel] = {}
        self._is_off = False
        self.is_ready = False
        """Whether taps may launch kernels: all that are there were tried."""
        with torch.inference_mode(False):
            self._table = torch.tensor(table_of(plan), dtype=torch.int64, device=slabs.device)
            self._memory = self._memory_of(control.block, slabs.memory)
        self._place, self._max_programs = slabs.memory.get_device(), source.MAX_PROGRAMS
        self._is_only = self._place < 0 or torch.cuda.device_count() == 1

    def _memory_of(self, control: Tensor, slabs: Tensor) -> Memory:
        device, num_sites = self._device, self._plan.num_sites
        return Memory(
            control,
            self._table,
            slabs.view(torch.int64),
            slabs.view(torch.float32),
            torch.zeros((num_sites, self._source.MAX_PROGRAMS), dtype=torch.float32, device=device),
            torch.zeros(num_sites, dtype=torch.int32, device=device),
        )

    @property
    def path(self) -> str:
        """What takes sites: `TRITON` or `TORCH`."""
        return TRITON if self.is_ready else TORCH

    # -- in a step -----------------------------------------------------------------------------------------------

    def make(
        self,
        site: Site,
        current: Current,
        desk: Desk,
        silent: Container[int],
        whole: Tap,
        measure: Callable[[Site, Tensor, Tensor | None, Full], None],
    ) -> Tap:
        """Return the tap of a site. silent: sites that have yet to fire, of which torch's operations learn shapes.

        whole: the tap by those. measure: takes what statistics are due.
        """
        number, axis, is_boundary = site.number, site.axis, site.boundary

        def tap(x: Tensor, source: Tensor | None = None) -> None:
            full = current.full
            area = None if full is None else full.rows.get(number)
            is_left = not current.is_fused or number in silent or (desk.sheet is not None and not desk.is_recording)
            if is_left or not self._launch(number, x, is_boundary, area):
                whole(x, source)
            elif full is not None:
                measure(site, valid_rows(x.detach(), current.num_valid[axis]), source, full)

        return tap

    def _launch(self, site: int, x: Tensor, is_boundary: bool, area: RowArea | None) -> bool:
        """Launch the kernel of a site; return False where it has none that fits, and nothing was done."""
        dest = kept = as_kept = None
        if area is not None:
            if area.indices is not None or area.form.width != width_of(x) or site in area.broken:
                return False
            dest, kept, as_kept = area.dest, area.values, area.dtype
        elif x.dtype not in _LOADED:
            x = plain(x)
        width = x.shape[-1] if x.ndim > 1 else 1
        kernel = self._kernels.get((x.dtype, as_kept, width, is_boundary))
        if kernel is None or type(x) not in _TENSORS or x.layout is not torch.strided or x.is_neg():
            return False
        if x.get_device() != self._place:
            return False
        strides = (width, 1) if x.is_contiguous() else row_strides(x.shape, x.stride())
        if strides is None or max(strides[0], width * strides[1]) > _FURTHEST:
            return False
        if kernel.is_even and (strides[1] != 1 or (x.data_ptr() | strides[0]) & _MISALIGNED):
            return False
        if self._is_only or torch.cuda.current_device() == self._place:
            self._run(kernel, self._memory, x, dest, kept, width, strides, site)
        else:  # Triton launches on the device of the thread, whatever it is given
            with torch.cuda.device(self._place):
                self._run(kernel, self._memory, x, dest, kept, width, strides, site)
        return True

    def _run(
        self,
        kernel: Kernel,
        memory: Memory,
        x: Tensor,
        dest: Tensor | None,
        kept: Tensor | None,
        width: int,
        strides: tuple[int, int],
        site: int,
    ) -> Any:
        """Launch a kernel; return what Triton compiled, where this was its first launch."""
        num_rows = x.numel() // width
        grid = (min(max(1, -(-num_rows // kernel.block_rows)), self._max_programs), 1, 1)
        given = (x, *memory, dest, kept, num_rows, width, *strides, site, *kernel.constants)
        if kernel.compiled is not None:
            return kernel.compiled[grid](*given)
        return kernel.source[grid](*given, num_warps=kernel.num_warps)

    # -- before it -----------------------------------------------------------------------------------------------

    def prepare(self, shapes: Shapes, rules: InForce) -> None:
        """Compile the kernels of sites of which it is known what they return, and compare each with torch.

        One that fails, or says something else, is a line in the log, and sites are left to torch's operations.
        """
        if self._is_off:
            return
        try:
            with torch.cuda.device(self._place) if self._place >= 0 else nullcontext(), torch.inference_mode(False):
                forms = rules.forms(shapes)
                for number, (width, dtype) in shapes.items():
                    if 0 < width <= _WIDEST and number < len(self._plan.sites):
                        self._prepare(number, width, dtype, kept_as(forms.get(number), dtype))
            self.is_ready = True
        except Exception as error:  # of a compiler, a driver, or ours
            self._is_off, self.is_ready = True, False
            logger.warning("insitu: taps are operations of torch: %s: %s", type(error).__name__, error)

    def _prepare(self, site: int, width: int, dtype: torch.dtype, kept: torch.dtype | None) -> None:
        is_boundary = self._plan.sites[site].boundary
        numbers = plain(torch.empty((1, width), dtype=dtype, device="cpu"))
        needs: list[Need] = [(numbers.dtype, None, width_of(numbers), is_boundary)]
        if kept is not None:
            needs.append((dtype, kept, width, is_boundary))
        for need in needs:
            if need not in self._kernels:
                kernel = self._kernel(need)
                kernel = replace(kernel, compiled=self._try(kernel, need, site, is_finite=True))
                self._try(kernel, need, site, is_finite=False)
                self._kernels[need] = kernel

    def _kernel(self, need: Need) -> Kernel:
        _, kept, width, is_boundary = need
        columns = min(1 << (width - 1).bit_length(), _MAX_COLUMNS)
        rows, is_even = max(1, _TILE // columns), not width & _MISALIGNED
        constants = (is_boundary, kept is not None, rows, columns, self._source.MAX_PROGRAMS)
        source = self._source.EVEN if is_even else self._source.ODD
        return Kernel(source, constants, 4 if columns <= _TILE else 8, rows, is_even)

    def _try(self, kernel: Kernel, need: Need, site: int, *, is_finite: bool) -> Any:
        """Run a kernel in memory of its own; return what was compiled, if this was its first launch.

        is_finite: False for a NaN among the values, where the dtype has one. Raises RuntimeError where the kernel says
        anything but what torch says.
        """
        dtype, kept_dtype, width, is_boundary = need
        max_rows, device = self._plan.max_rows, self._device
        x = torch.arange(_TRIED_ROWS * width, dtype=torch.float32, device=device).sin_().mul_(4)
        x = (x.abs_() if dtype is torch.uint8 else x).view(_TRIED_ROWS, width).to(dtype)
        if not is_finite and dtype.is_floating_point:
            x[1, width - 1] = torch.nan
        told = [_TRIED_STEP, 0, _TRIED_VALID, _TRIED_VALID, 0, 0, 0, 0]
        control = torch.tensor(told, dtype=torch.int64, device=device)
        slab = torch.zeros((1, self._plan.slab_bytes), dtype=torch.uint8, device=device)
        dest = kept = None
        if kept_dtype is not None:  # the first two rows; all others have no place
            dest = torch.arange(max_rows, device=device)
            dest[2:] = max_rows
            kept = torch.zeros((2, width), dtype=kept_dtype, device=device)
        compiled = self._run(kernel, self._memory_of(control, slab), x, dest, kept, width, (width, 1), site)
        valid = x[:_TRIED_VALID].cpu()
        _compare(slab.cpu(), self._table[site].tolist(), valid, is_boundary, kept is not None)
        if kept is not None:
            expected = valid[:2].to(kept.dtype)
            expected[max_rows:] = 0
            if not torch.allclose(kept.cpu().double(), expected.double(), 0, 0, equal_nan=True):
                raise RuntimeError(f"the kernel for {dtype} keeps other rows than torch")
        return compiled


def _compare(slab: Tensor, table: list[int], valid: Tensor, is_boundary: bool, has_rows: bool) -> None:
    """Raise RuntimeError unless a slab holds what the valid rows say. table: of the site."""
    _, stamp, count, canary, row_sum, row_absmax, _, max_rows = table
    words, floats, x = slab.view(torch.int64)[0], slab.view(torch.float32)[0].double(), valid.double()
    num = min(len(x), max_rows)
    whole = [(words[stamp], _TRIED_STEP)] + [(words[count], len(x))] * (is_boundary or has_rows)
    pairs = [(floats[canary], x.sum())]
    if is_boundary:
        pairs += [(floats[row_sum : row_sum + num], x.sum(1)[:num])]
        pairs += [(floats[row_absmax : row_absmax + num], x.abs().amax(1)[:num])]
    room = 1e-5 * float(x.nan_to_num().abs().sum())
    if any(int(found) != expected for found, expected in whole) or not all(
        torch.allclose(found, expected, 1e-5, room, equal_nan=True) for found, expected in pairs
    ):
        raise RuntimeError(f"the kernel for {valid.dtype} says {whole} and {pairs}")
