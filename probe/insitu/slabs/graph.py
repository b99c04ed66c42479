"""Slabs that a compiled graph writes: one ring, indexed by what the control block says, so that K slabs are one graph.

A graph bakes in what Python said when it was traced, so the slab it writes can only be data. Each area is a tensor of
its own, [num_slabs + 1, ...], since a graph that writes two views of one memory must be rebuilt around their base. The
last slab is the trash: a call that belongs to no step writes there, and nobody reads it. The drain brings finished
steps over into the slabs of eager taps (`insitu.slabs.slab`), of which it reads everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from insitu.slabs.slab import NEVER, Plan, Slabs

if TYPE_CHECKING:
    from insitu.session.step import StepRecord

STAMP, COUNT = 0, 1
"""Rows of `words`."""
STEP, SLAB, NUM_ROWS, NUM_SAMPLES, ROW_SLAB = 0, 1, 2, 3, 5
"""Places in the control block that a graph reads."""


class GraphSlabs:
    """The ring of one model on its device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        num_slabs = plan.num_slabs + 1
        self.max_rows: Final = plan.max_rows
        self.boundary: Final = {site: at * (plan.max_rows + 1) for at, site in enumerate(plan.boundaries)}
        """Boundary site -> its first place in the rows of a slab. Its last place is the trash row: of padding, and of
        rows beyond `max_rows`."""
        with torch.inference_mode(False):
            self.words = torch.full((num_slabs, 2, plan.num_sites), NEVER, dtype=torch.int64, device=device)
            self.canary = torch.zeros((num_slabs, plan.num_sites), dtype=torch.float32, device=device)
            rows = (num_slabs, len(self.boundary) * (plan.max_rows + 1))
            self.row_sum = torch.zeros(rows, dtype=torch.float32, device=device)
            self.row_absmax = torch.zeros_like(self.row_sum)
            self.idle = torch.zeros(8, dtype=torch.int64, device=device)
            """The control block of a call that belongs to no step."""
            self.idle[STEP], self.idle[SLAB] = NEVER, plan.num_slabs
            self.sink = torch.zeros(1, dtype=torch.int64, device=device)
            """What operators that go on in Python say they write."""

    def settle(self, records: Sequence[StepRecord], slabs: Slabs) -> None:
        """Copy what graphs wrote in finished steps, each of which has a slab, to where the drain reads.

        Only sites that a graph stamped: a module that ran outside of it has written there itself.
        """
        device = self.words.device
        places = torch.tensor([record.slab for record in records], dtype=torch.int64, device=device)
        steps = torch.tensor([record.step_id for record in records], dtype=torch.int64, device=device)
        words, canary = self.words[places], self.canary[places]
        fired = words[:, STAMP] == steps[:, None]
        is_counted = fired & (words[:, COUNT] != NEVER)
        for name, found, told in (
            ("stamp", words[:, STAMP], fired),
            ("count", words[:, COUNT], is_counted),
            ("canary", canary, fired),
        ):
            area = slabs.areas[name]
            area[places] = torch.where(told, found, area[places])
        boundaries = list(self.boundary)
        if boundaries:
            most = int(words[:, COUNT, boundaries].max().clamp(0, self.max_rows))
            self._settle_rows(places, fired[:, boundaries, None], most, slabs)

    def _settle_rows(self, places: Tensor, fired: Tensor, most: int, slabs: Slabs) -> None:
        """most: the most rows any of these steps has; what lies behind them is not copied."""
        for name, ring in (("row_sum", self.row_sum), ("row_absmax", self.row_absmax)):
            area = slabs.areas[name]
            found = ring[places].view(len(places), len(self.boundary), -1)[:, :, :most]
            area[places, :, :most] = torch.where(fired, found, area[places, :, :most])
