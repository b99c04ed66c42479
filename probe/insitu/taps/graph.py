"""Taps inside a compiled graph: what a compiler traces in place of the taps of `insitu.taps`.

While `torch.compile` traces a tapped module, its tap notes what it saw on a sheet; at the end of the model's forward
the sheet is written into the ring, all sites at once. The sheet lives as long as the tracing: what is left in the graph
is a reduction a site and a few writes at fixed addresses, in plain aten, which Inductor fuses with their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from insitu.sites.site import Site
from insitu.slabs.graph import NUM_ROWS, NUM_SAMPLES, ROW_SLAB, SLAB, STEP, GraphSlabs
from insitu.slabs.rows import RowArea, cast_rows
from insitu.slabs.slab import NEVER
from insitu.taps.plain import bits_of, plain, rows_of, width_of

_ALL: Final = 1 << 40
"""More rows than any tensor has: of a step that does not say how many are valid."""
_SEQUENCE: Final = (tuple, list)
UNFIT: Final = -1
"""Width of a site whose module returns nothing a sum could be taken of."""


class Seen(NamedTuple):
    """What tracing told of a site."""

    number: int
    width: int
    dtype: torch.dtype | None
    keeps_rows: bool = True
    """False where its rows were asked for and have not the width that there is memory for."""
    num_calls: int = 1
    """In the forward; the last one stays."""


class Kept(NamedTuple):
    """Where a graph keeps rows of a site: `RowArea` of all slabs, as plain as a compiler likes it."""

    values: Tensor
    """[num_slabs, max_rows + 1, width]."""
    indices: Tensor | None
    dest: Tensor
    width: int
    dtype: torch.dtype


def kept(area: RowArea) -> Kept:
    return Kept(area.values, area.indices, area.dest, area.form.width, area.dtype)


class Desk:
    """What the taps of one model share while it is traced. Plain attributes: a compiler follows those."""

    def __init__(self) -> None:
        self.sheet: Sheet | None = None
        """Of the forward that is being traced; None outside of one, where taps write nothing."""
        self.memory: GraphSlabs | None = None
        """None until the model first runs compiled."""
        self.seen: tuple[Seen, ...] = ()
        """Of the sites of the last forward."""
        self.is_recording = False
        """Whether the host captures a CUDA graph: kernels go in as they are, since memory tells them the step."""
        self.is_captured = False
        """Whether a CUDA graph that the host made holds taps: from then on steps may be replays."""


def found_in(output: Any, index: int) -> Tensor | None:
    """Return the tensor at a place of what a module returned, or None where there is none to be summed."""
    if not isinstance(output, Tensor):
        if hasattr(output, "to_tuple"):  # outputs of transformers
            output = output.to_tuple()
        if not isinstance(output, _SEQUENCE) or index >= len(output):
            return None
        output = output[index]
    if type(output) not in (Tensor, nn.Parameter) or output.layout != torch.strided:
        return None
    return None if output.is_complex() or output.is_quantized else output  # no compiler knows what to do with these


class Sheet:
    """What the taps of one traced forward saw."""

    def __init__(
        self, desk: Desk, control: Tensor, rows: dict[int, Kept] | None, measured: frozenset[int] = frozenset()
    ) -> None:
        """rows: site -> where its rows are kept; None in a quiet step. measured: sites whose taps go on in Python."""
        assert desk.memory is not None, "memory is made before anything is traced"
        self.memory = desk.memory
        self.is_full = rows is not None
        self.rows = rows or {}
        self.measured = measured
        self.step_id = control[STEP : STEP + 1]
        self.slab, self.row_slab = control[SLAB : SLAB + 1], control[ROW_SLAB : ROW_SLAB + 1]
        valid = torch.where(control < 0, _ALL, control)
        self.valid = {"tokens": valid[NUM_ROWS], "batch": valid[NUM_ROWS], "samples": valid[NUM_SAMPLES]}
        self.canary: dict[int, Tensor] = {}
        self.count: dict[int, Tensor] = {}
        self.seen: dict[int, Seen] = {}

    def note(
        self, number: int, axis: str, x: Tensor | None, only_full: bool = False, source: Tensor | None = None
    ) -> None:
        """Note what a site holds; of a module that is called again, the last call stays. source: what a layer read."""
        if x is None or x.device != self.memory.words.device:
            self.seen[number] = Seen(number, UNFIT, None)
            return
        num_calls = self.seen[number].num_calls + 1 if number in self.seen else 1
        self.seen[number] = Seen(number, width_of(x), x.dtype, num_calls=num_calls)
        if only_full and not self.is_full:
            return
        rows = rows_of(x.detach())
        numbers = plain(rows)
        row = torch.arange(rows.shape[0], device=rows.device)
        is_valid = row < self.valid[axis]
        sums = numbers.sum(1, dtype=torch.float32)
        self.canary[number] = torch.where(is_valid, sums, 0.0).sum()
        is_boundary, keeps_rows = number in self.memory.boundary, number in self.rows
        if is_boundary or keeps_rows:
            self.count[number] = is_valid.sum()
            place = torch.where(is_valid & (row < self.memory.max_rows), row, self.memory.max_rows)
            if is_boundary:
                self._take_boundary(self.memory.boundary[number] + place, numbers, sums)
            if keeps_rows:
                self._take_rows(number, place, rows)
        if number in self.measured:
            torch.ops.insitu.take_1(self.memory.sink, x, source, number)

    def note_chosen(self, number: int, chosen: Tensor | None) -> None:
        """Note which experts a router chose."""
        if self.is_full and chosen is not None:
            torch.ops.insitu.count_1(self.memory.sink, chosen, number)

    def _take_boundary(self, place: Tensor, numbers: Tensor, sums: Tensor) -> None:
        """Write each row's sum and largest magnitude."""
        self.memory.row_sum.index_put_((self.slab, place), sums)
        self.memory.row_absmax.index_put_((self.slab, place), _absmax(numbers, sums))

    def _take_rows(self, number: int, place: Tensor, rows: Tensor) -> None:
        """Write the wanted rows to their places, every other to the trash row."""
        area, trash = self.rows[number], self.memory.max_rows
        aimed = area.dest[place.clamp(max=trash - 1)]
        at = (self.row_slab, torch.where(place < trash, aimed, trash))
        if area.indices is not None and rows.shape[1] >= area.width:
            rows, indices = torch.topk(rows, area.width, 1)
            area.indices.index_put_(at, indices.to(torch.int32))
        if rows.shape[1] != area.width:
            num_calls = self.seen[number].num_calls
            self.seen[number] = Seen(number, rows.shape[1], rows.dtype, keeps_rows=False, num_calls=num_calls)
            return
        if rows.dtype != area.dtype:
            rows = cast_rows(rows, area.dtype)
        bits_of(area.values).index_put_(at, bits_of(rows))

    def write(self) -> None:
        """Write the sites that were noted into the slab of the step; the ring's other slabs stay as they are."""
        if not self.canary:
            return
        memory, device = self.memory, self.memory.words.device
        size, numbers = memory.words.shape[2], sorted(self.canary)
        never = torch.full((1,), NEVER, dtype=torch.int64, device=device)
        zero = torch.zeros(1, dtype=torch.float32, device=device)
        stamps = [(first, self.step_id.expand(stop - first)) for first, stop in runs_of(numbers)]
        counts = [(number, self.count[number].reshape(1)) for number in sorted(self.count)]
        words = torch.stack([_line(stamps, size, never), _line(counts, size, never)])
        memory.words.index_copy_(0, self.slab, words[None])
        sums = _line([(number, self.canary[number].reshape(1)) for number in numbers], size, zero)
        memory.canary.index_copy_(0, self.slab, sums[None])


def _absmax(numbers: Tensor, sums: Tensor) -> Tensor:
    """Return each row's largest magnitude, NaN where a row has one. sums: one for each row."""
    if not numbers.shape[1]:
        return torch.zeros_like(sums)
    if numbers.is_floating_point():
        return numbers.abs().amax(1).float()
    return torch.maximum(numbers.amax(1).float(), numbers.amin(1).float().neg())


def _line(parts: Sequence[tuple[int, Tensor]], size: int, missing: Tensor) -> Tensor:
    """Return [size] made of parts at their places, in order, and of `missing` [1] between them."""
    pieces, at = [], 0
    for first, part in parts:
        pieces += [missing.expand(first - at), part]
        at = first + part.shape[0]
    pieces.append(missing.expand(size - at))
    return torch.cat(pieces)


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, stop) of neighbours among ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def traced_forward(forward_of: Callable[..., Any], site: Site, desk: Desk, only_full: bool) -> Callable[..., Any]:
    """Return what a compiler traces as the forward of a tapped module. only_full: nothing is taken in a quiet step."""
    number, axis, index = site.number, site.axis, site.index
    has_source, is_router = site.is_residual, site.num_experts > 0
    part = site.part.of if site.part is not None else None

    def of_output(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward_of(self, *args, **kwargs)
        sheet = desk.sheet
        if sheet is not None:
            x = found_in(output, index)
            source = found_in(args or kwargs.get("hidden_states"), 0) if has_source else None
            sheet.note(number, axis, x if part is None or x is None else part(x), only_full, source)
            if is_router:
                sheet.note_chosen(number, found_in(output, len(output) - 1))
        return output

    def of_input(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sheet = desk.sheet
        if sheet is not None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sheet.note(number, axis, found_in(given, index), only_full)
        return forward_of(self, *args, **kwargs)

    return of_input if site.io == "in" else of_output
