"""Memory for raw rows: a ring of slabs, and the vector that sends each row of a step to its place in one.

Per row site a slab holds [max_rows + 1, width]; the last row is the trash row. Rows nobody wants (padding, requests
that were not chosen) go there: selecting, padding and leaving out are one mechanism without a branch. A slab has room
for the largest step; small ones share one: a ring of large slabs is short, and a look of the drain costs what it costs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from insitu.row_forms import RowForm
from insitu.sites.site import Site
from insitu.slabs.slab import MAX_SLABS, Ring
from insitu.taps.plain import bits_of

logger = logging.getLogger("insitu")

ROW_BUDGET_BYTES: Final = 64 << 20
"""Most memory for raw rows, all slabs together; two slabs there are in any case."""


def num_slabs_of(forms: Mapping[int, RowForm], max_rows: int, budget_bytes: int = ROW_BUDGET_BYTES) -> int:
    """Return how many slabs of these rows there are."""
    return max(2, min(MAX_SLABS, budget_bytes // max(slab_bytes_of(forms, max_rows), 1)))


def slab_bytes_of(forms: Mapping[int, RowForm], max_rows: int) -> int:
    """Return the bytes of one slab of these rows."""
    return (max_rows + 1) * sum(form.num_bytes for form in forms.values())


@dataclass(frozen=True, slots=True)
class RowArea:
    """Where the rows of one site go in one slab."""

    form: RowForm
    dtype: torch.dtype
    values: torch.Tensor
    """[max_rows + 1, width]; of all slabs [num_slabs, max_rows + 1, width]."""
    indices: torch.Tensor | None
    """int32, as `values`: the places of the largest in their rows."""
    dest: torch.Tensor
    """int64[max_rows]: to which place each row goes."""
    broken: dict[int, int]
    """Of the ring: site -> the first step of which nothing could be kept there."""

    def take(self, site: Site, x: torch.Tensor, step_id: int) -> None:
        """Keep rows [rows, width]; where that cannot be (another width, a type that has no such form) it is said once
        and not tried again."""
        if site.number in self.broken:
            return
        try:
            self._put(x)
        except (RuntimeError, TypeError, ValueError) as error:
            self.broken[site.number] = step_id
            logger.warning("insitu: no rows of %s (%s: %s)", site.name, type(error).__name__, error)

    def _put(self, x: torch.Tensor) -> None:
        dest, width = self.dest[: x.shape[0]], self.form.width
        if self.indices is not None:
            x, indices = torch.topk(x, width, 1)
            self.indices.index_copy_(0, dest, indices.to(torch.int32))
        if x.shape[1] != width:
            raise ValueError(f"rows of {width} values turned out to have {x.shape[1]}")
        if x.dtype is not self.dtype:
            x = cast_rows(x, self.dtype)
        bits_of(self.values).index_copy_(0, dest, bits_of(x))


def cast_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in another type. float8 has no infinities: it holds what is too large as its largest number, and what
    is not finite as NaN, so that neither is taken for the other."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    x = x.float()
    return torch.where(x.isfinite(), x.clamp(-most, most), torch.nan).to(dtype)


class RowSlabs:
    """The ring of raw-row memory: an area a row site."""

    def __init__(
        self,
        forms: Mapping[int, RowForm],
        max_rows: int,
        device: torch.device,
        budget_bytes: int = ROW_BUDGET_BYTES,
    ) -> None:
        num_slabs = num_slabs_of(forms, max_rows, budget_bytes)
        self.forms = forms
        self.max_rows = max_rows
        self.ring = Ring(num_slabs)
        self._open: int | None = None
        """The slab that takes steps now. The step thread's, as are the next two."""
        self._next = self._num_open = 0
        """Its first free place, and how many steps it holds."""
        self._closed: deque[int] = deque()
        """How many steps there are in slabs that take no more, in order: the step thread appends, the drain takes."""
        self._num_read = 0
        """Steps that the drain has read of slabs which are not free again."""
        self._bytes_put = self._bytes_read = 0
        """Of all steps so far, at most: the step thread counts these, the drain those it read."""
        self.num_bytes = num_slabs * slab_bytes_of(forms, max_rows)
        self.broken: dict[int, int] = {}
        shape = (num_slabs, max_rows + 1)
        with torch.inference_mode(False):
            self._values = {
                site: torch.zeros((*shape, form.width), dtype=getattr(torch, form.dtype), device=device)
                for site, form in forms.items()
            }
            self._indices = {
                site: torch.zeros((*shape, form.width), dtype=torch.int32, device=device)
                for site, form in forms.items()
                if form.is_top
            }

    @property
    def slab_bytes(self) -> int:
        return self.num_bytes // self.ring.size

    @property
    def is_filling(self) -> bool:
        """True when the drain is to be woken: half of the slabs, or of the last one, hold steps."""
        num_full = self.ring.num_taken - (self._open is not None)
        is_last = self.ring.num_taken == self.ring.size
        return 2 * num_full >= self.ring.size or (is_last and 2 * self._next >= self.max_rows)

    @property
    def waiting_bytes(self) -> int:
        """Most bytes of rows in steps that were not read yet."""
        return self._bytes_put - self._bytes_read

    def take(self, num_rows: int | None, num_bytes: int = 0) -> tuple[int, int] | None:
        """Return the slab of a step that keeps so many rows at a site, and its first place there. The step thread's.

        num_rows: None where any number may come; the step then has a slab to itself. num_bytes: most that it keeps in
        all. None where no slab is free.
        """
        wanted = self.max_rows if num_rows is None else num_rows
        if self._open is None or self._next + wanted > self.max_rows:
            self._close()
            self._open, self._next, self._num_open = self.ring.take(), 0, 0
            if self._open is None:
                return None
        taken = self._open, self._next
        self._bytes_put += num_bytes
        self._next += wanted
        self._num_open += 1
        if self._next + wanted > self.max_rows:
            self._close()
        return taken

    def _close(self) -> None:
        if self._open is not None:
            self._closed.append(self._num_open)
            self._open = None

    def free(self, num_steps: int, num_bytes: int = 0) -> None:
        """Take note that so many more steps were read, in their order, and give slabs back of which all were."""
        self._num_read += num_steps
        self._bytes_read += num_bytes
        while self._closed and self._num_read >= self._closed[0]:
            self._num_read -= self._closed.popleft()
            self.ring.free()

    def start_over(self) -> None:
        """Give all slabs back, whatever they hold."""
        self.ring.clear()
        self._closed.clear()
        self._open, self._num_read = None, 0
        self._bytes_read = self._bytes_put

    def areas(self, place: int, dest_of: Mapping[int, torch.Tensor]) -> dict[int, RowArea]:
        """Return the areas of one slab by site. dest_of: site -> its destination vector."""
        with torch.inference_mode(False):
            values = {site: ring[place] for site, ring in self._values.items()}
            return self._areas(values, {site: ring[place] for site, ring in self._indices.items()}, dest_of)

    def rings(self, dest_of: Mapping[int, torch.Tensor]) -> dict[int, RowArea]:
        """As `areas`, of all slabs: for graphs, to which the slab is a number in memory."""
        return self._areas(self._values, self._indices, dest_of)

    def _areas(
        self,
        values: Mapping[int, torch.Tensor],
        indices: Mapping[int, torch.Tensor],
        dest_of: Mapping[int, torch.Tensor],
    ) -> dict[int, RowArea]:
        return {
            site: RowArea(form, getattr(torch, form.dtype), values[site], indices.get(site), dest_of[site], self.broken)
            for site, form in self.forms.items()
        }

    def read(self, site: int, places: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return row `rows[i]` of slab `places[i]` of a site, as bytes [n, form.num_bytes] on the host; a copy."""
        values = _bytes_of(self._values[site], places, rows)
        if site not in self._indices:
            return values
        return np.hstack([values, _bytes_of(self._indices[site], places, rows)])


def _bytes_of(area: torch.Tensor, places: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    if area.device.type == "cpu":
        found: NDArray[np.uint8] = area.view(torch.uint8).numpy()[places, rows]
        return found
    return bits_of(area)[torch.from_numpy(places), torch.from_numpy(rows)].cpu().view(torch.uint8).numpy()


class Destinations:
    """Device int64[num_groups, max_rows]: to which place each row of a step goes; one async copy a step with rows.

    Staged as `insitu.slabs.slab.ControlBlock` is: a block for each slab.
    """

    def __init__(self, device: torch.device, num_groups: int, max_rows: int, num_slabs: int = 1) -> None:
        """num_slabs: of the ring; one more stands for none of them."""
        with torch.inference_mode(False):
            self._staged = torch.zeros(
                (num_slabs + 1, num_groups, max_rows),
                dtype=torch.int64,
                device="cpu",
                pin_memory=device.type != "cpu",
            )
            self._dest = torch.full((num_groups, max_rows), max_rows, dtype=torch.int64, device=device)
            self.of_group = tuple(self._dest)
        self._rows = self._staged.numpy()

    def aim(self, wanted: Sequence[Sequence[int]], slab: int = -1, first: int = 0) -> None:
        """Send row `wanted[g][i]` of group g to place `first + i`; every other row to the trash row.

        slab: of the step; -1: of none.
        """
        rows = self._rows[slab]
        rows.fill(rows.shape[1])
        for group, indices in enumerate(wanted):
            rows[group, np.asarray(indices, np.int64)] = np.arange(first, first + len(indices))
        self._dest.copy_(self._staged[slab], non_blocking=True)
